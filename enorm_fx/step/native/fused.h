// One pass: what an optimizer does to its parameters, on weights that take the factors of the step
// before, and the solution of the next step's factors from the weights that it has just written.
//
// Factors that wait: w <- d w, buffers by their power of d, g <- g / d, all in registers. Included by
// step.cpp, whose Step measures and solves.

#pragma once

#include <algorithm>

#include "tables.h"

namespace {

// Entries that are updated, then summed. A few KiB stay in the first cache, and memory, which is what
// an update waits for, goes on reading ahead over so short a pause.
constexpr i64 PIECE = 512;

// What is added up of a line's new weights while they are in registers: nothing, all squares (which are
// returned), or each square to the sum of its column.
enum Sums { NONE, SUM, COLUMNS };

// One line of entries that share a factor by row. g takes the inverse, which is found by division: to
// read it from memory as well takes longer.
// KIND: see Update; SCALED: factors wait; STEPPED: there is a gradient.
template <class W, int KIND, bool SCALED, bool STEPPED, Sums SUMS>
W update_line(W* w, const W* g, W* a, W* b, W* c, const W* col, W by_row, i64 n, const Rates& r, W* sums) {
    const W sign = W(r.sign), decay = W(r.decay), shrink = W(r.shrink), rate = W(r.rate);
    const W keep = W(r.keep), take = W(r.take), direct = W(r.direct), through = W(r.through);
    const W keep2 = W(r.keep2), take2 = W(r.take2), root = W(r.root), eps = W(r.eps);
    W total = 0;
#pragma omp simd reduction(+ : total)
    for (i64 j = 0; j < n; j++) {
        const W factor = SCALED ? by_row * col[j] : W(1), inverse = SCALED ? 1 / factor : W(1);
        W x = SCALED ? w[j] * factor : w[j], y = 0;
        if (STEPPED) y = sign * (SCALED ? g[j] * inverse : g[j]) + decay * x;
        if (KIND == PLAIN) {
            if (STEPPED) x -= rate * y;
        } else if (KIND == MOMENTUM) {
            W m = SCALED ? a[j] * inverse : a[j];
            if (STEPPED) m = keep * m + take * y, x -= rate * (direct * y + through * m);
            a[j] = m;
        } else {
            W m = SCALED ? a[j] * inverse : a[j], v = SCALED ? b[j] * (inverse * inverse) : b[j];
            W most = 0;
            if (KIND == AMSGRAD) most = SCALED ? c[j] * (inverse * inverse) : c[j];
            if (STEPPED) {
                m += take * (y - m);
                v = keep2 * v + take2 * y * y;
                if (KIND == AMSGRAD) most = v > most ? v : most;
                x = x * shrink - rate * m / (std::sqrt(KIND == AMSGRAD ? most : v) * root + eps);
            }
            a[j] = m, b[j] = v;
            if (KIND == AMSGRAD) c[j] = most;
        }
        w[j] = x;
        if (SUMS == SUM) total += x * x;
        if (SUMS == COLUMNS) sums[j] += x * x;
    }
    return total;
}

// Entries begin <= k < end of a parameter and of its buffers, in memory order. sums: that of `begin`.
template <class W, int KIND, bool SCALED, bool STEPPED, Sums SUMS>
W update_range(const Update& u, const W* g, const Rates& r, i64 begin, i64 end, W* sums) {
    W *w = (W*)u.weight, *a = (W*)u.first, *b = (W*)u.second, *c = (W*)u.third;
    const i64 n = SCALED ? u.width : u.size;
    W total = 0;
    for (i64 k = begin; k < end;) {
        const i64 row = k / n, at = k - row * n, stop = row * n + n < end ? row * n + n : end;
        const W* col = SCALED ? (const W*)u.factors->col + at : nullptr;
        const W by_row = SCALED ? W(u.factors->row[row]) : 1;
        total += update_line<W, KIND, SCALED, STEPPED, SUMS>(
            w + k, g + (STEPPED ? k : 0), a + (a ? k : 0), b + (b ? k : 0), c + (c ? k : 0), col, by_row,
            stop - k, r, sums + (sums ? k - begin : 0));
        k = stop;
    }
    return total;
}

template <class W, int KIND, Sums SUMS>
W update_range(const Update& u, const W* g, const Rates& r, i64 begin, i64 end, W* sums) {
    if (u.factors && g) return update_range<W, KIND, true, true, SUMS>(u, g, r, begin, end, sums);
    if (u.factors) return update_range<W, KIND, true, false, SUMS>(u, g, r, begin, end, sums);
    if (g) return update_range<W, KIND, false, true, SUMS>(u, g, r, begin, end, sums);
    return 0;
}

struct FusedStep : Step {
    const Fused& fused;

    FusedStep(const Recipe& recipe, Common& common, int thread, int threads, const Fused& fused)
        : Step{recipe, common, thread, threads}, fused(fused) {}

    template <class W, Sums SUMS> W update(i64 number, i64 begin, i64 end, W* sums) const {
        const Update& u = fused.updates[number];
        const W* g = (const W*)fused.gradients[number];
        const Rates& r = fused.rates[fused.rates_of[number]];
        if (u.kind == PLAIN) return update_range<W, PLAIN, SUMS>(u, g, r, begin, end, sums);
        if (u.kind == MOMENTUM) return update_range<W, MOMENTUM, SUMS>(u, g, r, begin, end, sums);
        if (u.kind == ADAM) return update_range<W, ADAM, SUMS>(u, g, r, begin, end, sums);
        return update_range<W, AMSGRAD, SUMS>(u, g, r, begin, end, sums);
    }
    void update(i64 number, i64 begin, i64 end) const {
        if (fused.updates[number].dtype == DOUBLE) update<double, NONE>(number, begin, end, nullptr);
        else update<float, NONE>(number, begin, end, nullptr);
    }

    // Parameters whose sums no pass takes from their own memory. Those with cells of their own are
    // summed piece by piece, in the pieces of `measure`.
    void update_rest() const {
        auto form = [&](i64 k) -> Form {
            const Rest& rest = fused.rest[k];
            if (rest.block >= 0) return recipe.forms[recipe.blocks[rest.block].form];
            return Form{fused.updates[rest.update].size, 1, 1, {}, {}};
        };
        auto skipped = [](i64) { return false; };
        in_pieces(common.applied, fused.rest_count, form, skipped, [&](i64 k, Share rows) {
            const Rest& rest = fused.rest[k];
            const Form f = form(k);
            const Share cells = cells_of(f, rows);
            i64 height = rest.block < 0 ? cells.end - cells.begin : PIECE / f.run;
            height = height > ROUND ? height / ROUND * ROUND : height ? height : 1;
            for (i64 cell = cells.begin; cell < cells.end; cell += height) {
                const i64 end = cell + height < cells.end ? cell + height : cells.end;
                update(rest.update, cell * f.run, end * f.run);
                if (rest.block >= 0) sum_block(rest.block, {cell, end});
            }
        });
    }

    // The sums of a pass, over weights that are updated on the way: squares of long rows at once, others
    // piece by piece after it. Every later pass reads them anew.
    template <Mode M, class W>
    void first_pass(const Pass& pass, const W* w, i64 number, double& total) const {
        const Form& f = recipe.forms[recipe.blocks[pass.block].form];
        const i64 n = f.cols, height = n < PIECE ? PIECE / n : 1;
        const Share rows = share(f.rows, n, thread, threads);
        const bool at_once = M == SQUARES && height == 1 && number >= 0 && fused.gradients[number];
        double* out = pass.over_rows ? pass.out + thread * n : pass.out;
        W* sums = (W*)scratch();                       // of columns, over a few rows
        auto widen_sums = [&] {
            for (i64 j = 0; j < n; j++) out[j] = joined<M>(out[j], sums[j]), sums[j] = 0;
        };
        const Share summed = pass.over_rows ? Share{0, n} : rows;
        std::fill(out + summed.begin, out + summed.end, 0.0);
        if (pass.over_rows) std::fill(sums, sums + n, W(0));
        for (i64 o = rows.begin, widened = o; o < rows.end; o += height) {
            const i64 end = o + height < rows.end ? o + height : rows.end;
            for (i64 at = 0; at < n; at += PIECE) {
                const i64 width = at + PIECE < n ? PIECE : n - at, from = o * n + at;
                if (at_once && pass.over_rows) {
                    update<W, COLUMNS>(number, from, from + width, sums + at);
                } else if (at_once) {
                    out[o] += update<W, SUM>(number, from, from + width, nullptr);
                } else {
                    if (number >= 0) update(number, from, from + (end - o - 1) * n + width);
                    if (pass.over_rows)
                        for (i64 k = o; k < end; k++) add_line<M>(w + k * n + at, W(1), width, sums + at);
                    else if (height > 1)
                        along_rows<M>(w, Ones(), o, end, n, out);
                    else
                        out[o] = joined<M>(out[o], along<M>(w + from, Ones(), width));
                }
            }
            if (pass.over_rows && end - widened >= FLUSH) widen_sums(), widened = end;
        }
        if (pass.over_rows) widen_sums();
        total = all(out + summed.begin, summed.end - summed.begin);
        weigh<W>(out, summed, recipe.blocks[pass.block].weight);
    }

    template <class W> void run_first_pass(const Pass& pass, const W* w, i64 number) const {
        double& total = recipe.totals[pass.block * recipe.threads + thread];
        if (largest()) first_pass<MAXIMA>(pass, w, number, total);
        else if (recipe.p == 1) first_pass<ABSOLUTES>(pass, w, number, total);
        else first_pass<SQUARES>(pass, w, number, total);
    }
    void run_first_pass(const Pass& pass, i64 number) const {
        const Source& source = recipe.sources[recipe.blocks[pass.block].source];
        if (source.dtype == DOUBLE) run_first_pass(pass, (const double*)source.data, number);
        else run_first_pass(pass, (const float*)source.data, number);
    }

    void run() const {
        begin();
        update_rest();
        measure([&](i64 k) { return fused.summed[k] != 0; });
        barrier();
        if (thread == 0) pick();
        barrier();
        cycles([&](i64 number, bool first) {
            const Pass& pass = recipe.passes[number];
            if (first && !recipe.blocks[pass.block].sums) run_first_pass(pass, fused.of_pass[number]);
            else run_pass(pass, first);
        });
        make_factors([&](const Scaler& s) { return exponent(s) == 1; });   // see update_line
        if (thread == 0) *fused.reach = largest_log_scale();
    }
};

}  // namespace
