// One ENorm step over a whole model: measure, solve, decide, apply, in one call.
//
// `pack.py` packs a layout into the tables; the mathematics is that of descent.py, in linear
// space: e[v] = exp(p * u[v]) (p = inf: exp(u[v])). A tensor is a matrix of rows x cols x run
// entries in memory order. Its factors vary by row and by column, each as a product of terms
// e[ids]^coefficient; the `run` entries of a column take the same one.
//
// All threads live in one parallel region and meet at barriers. A thread takes the same rows of a
// weight every time: what it read for one sum is still in its cache for the next, and torch's kernels
// give it these rows too, whose optimizer has just written them.

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "numbers.h"
#include "slopes.h"
#include "tables.h"

namespace {

constexpr i64 ALONE = ENORM_ALONE;                     // entries below which one thread is enough
constexpr i64 TAKEN = 1 << 16;                         // entries that a thread takes at a time

struct Share { i64 begin, end; };
inline Share share(i64 rows, i64 row_size, int thread, int threads) {
    if (rows * row_size < ALONE) threads = 1;
    if (thread >= threads) return {0, 0};
    return {rows * thread / threads, rows * (thread + 1) / threads};
}

// What the threads of one step share.
struct alignas(64) Count { std::atomic<i64> taken{0}; };   // pieces, on a cache line of its own
struct Common {
    std::vector<Count> measured, applied;              // by thread
    int decision = 0;
    explicit Common(int threads) : measured(threads), applied(threads) {}
};

struct Step {
    const Recipe& recipe;
    Common& common;
    int thread, threads;

    // Rows of items 0 .. n - 1 in pieces: a thread takes those of its own share, which its cache may
    // hold, then what slower threads have left: cores are seldom equally fast.
    template <class FormOf, class Skipped, class Work>
    void in_pieces(std::vector<Count>& counts, i64 n, FormOf form, Skipped skipped, Work work) const {
        for (int turn = 0; turn < threads; turn++) {
            const int owner = (thread + turn) % threads;
            auto row_size = [&](i64 k) { return form(k).cols * form(k).run; };
            auto height = [&](i64 k) { return row_size(k) < TAKEN ? TAKEN / row_size(k) : i64(1); };
            auto part = [&](i64 k) {
                return skipped(k) ? Share{0, 0} : share(form(k).rows, row_size(k), owner, threads);
            };
            auto pieces = [&](i64 k) { return (part(k).end - part(k).begin + height(k) - 1) / height(k); };
            i64 k = 0, before = 0;
            for (i64 mine = counts[owner].taken++; k < n; mine = counts[owner].taken++) {
                while (k < n && mine >= before + pieces(k)) before += pieces(k++);
                if (k == n) break;
                i64 begin = part(k).begin + (mine - before) * height(k), end = begin + height(k);
                work(k, Share{begin, end < part(k).end ? end : part(k).end});
            }
        }
    }

    static Share cells_of(const Form& f, Share rows) { return {rows.begin * f.cols, rows.end * f.cols}; }
    bool largest() const { return std::isinf(recipe.p); }
    i64 width() const { return recipe.scales + 1; }
    double* scratch() const { return recipe.scratch + thread * recipe.scratch_width; }
    const double* power(i64 k) const { return recipe.e + k * width(); }
    const double* factor_power(i64 x, i64 k) const {
        return recipe.d + recipe.product[x * recipe.power_count + k] * width();
    }

    double exponent(const Scaler& s) const {             // coefficients begin with 1
        return recipe.products[recipe.product[s.exponent * recipe.power_count]];
    }

    // out[j] = product of the terms at position j (begin <= j < end); flats: table of powers.
    template <class Flat>
    void fill(const Terms& terms, i64 begin, i64 end, double* out, Flat flat) const {
        for (i64 j = begin; j < end; j++) out[j] = 1;
        for (i64 k = 0; k < terms.count; k++) {
            const double* table = flat(terms.power[k]);
            const int32_t* ids = terms.ids + k * terms.length;
            if (terms.first[k] >= 0)
                for (i64 j = begin; j < end; j++) out[j] *= table[terms.first[k] + j];
            else
                for (i64 j = begin; j < end; j++) out[j] *= table[ids[j]];
        }
    }
    void fill(const Terms& terms, i64 begin, i64 end, double* out) const {
        fill(terms, begin, end, out, [&](i64 k) { return power(k); });
    }

    // Factors scaled to a maximum of 1, in the precision of the cells; returns the maximum.
    template <class A> double weights(const Terms& terms, i64 n, double* wide, A* out) const {
        fill(terms, 0, n, wide);
        double most = 0;
        for (i64 j = 0; j < n; j++) most = wide[j] > most ? wide[j] : most;
        double inverse = 1 / most;
        for (i64 j = 0; j < n; j++) out[j] = A(wide[j] * inverse);
        return most;
    }

    template <class F> void with_cells(const Block& b, F&& f) const {
        if (b.sums) {
            if (b.wide) f((const double*)b.sums);
            else f((const float*)b.sums);
        } else {
            const Source& source = recipe.sources[b.source];
            with_dtype(source.dtype, [&](auto w) { f((const decltype(w)*)source.data); });
        }
    }

    // ---- measure

    template <class W, class A>
    void sum_cells(const W* w, i64 cell, i64 end, i64 run, A* out) const {
        if (recipe.p == 2) cell = sum_squares(w, cell, end, run, out);
        for (; cell < end; cell++) {
            const W* x = w + cell * run;
            A sum = 0;
            for (i64 r = 0; r < run; r++) {
                A y = std::abs(A(widen(x[r])));
                if (largest()) sum = !(y <= sum) ? (sum != sum ? sum : y) : sum;   // keeps NaN
                else sum += recipe.p == 2 ? y * y : recipe.p == 1 ? y : A(std::pow(y, A(recipe.p)));
            }
            out[cell] = sum;
        }
    }
    template <class W, class A> double sum_share(const W* w, i64 run, A* out, Share cells) const {
        sum_cells(w, cells.begin, cells.end, run, out);
        return all((const A*)out + cells.begin, cells.end - cells.begin);
    }

    void sum_block(i64 k, Share cells) const {
        const Block& b = recipe.blocks[k];
        const i64 run = recipe.forms[b.form].run;
        const Source& source = recipe.sources[b.source];
        with_dtype(source.dtype, [&](auto w) {
            auto* data = (const decltype(w)*)source.data;
            accumulate(recipe.totals[k * recipe.threads + thread],
                       b.wide ? sum_share(data, run, (double*)b.sums, cells)
                              : sum_share(data, run, (float*)b.sums, cells));
        });
    }

    // summed: blocks whose cells are known already.
    template <class Summed> void measure(Summed summed) const {
        auto form = [&](i64 k) -> const Form& { return recipe.forms[recipe.blocks[k].form]; };
        auto skipped = [&](i64 k) {
            return !recipe.blocks[k].sums || recipe.blocks[k].picked_count || summed(k);
        };
        in_pieces(common.measured, recipe.block_count, form, skipped,
                  [&](i64 k, Share rows) { sum_block(k, cells_of(form(k), rows)); });
    }
    template <class A> double all(const A* x, i64 n) const {
        return largest() ? along<LARGEST_VALUES>(x, Ones(), n) : along<VALUES>(x, Ones(), n);
    }
    void accumulate(double& total, double x) const { total = join(total, x, largest()) + (x - x); }

    // Cells in which a scale occurs twice leave their block, and make up one of their own.
    void pick() const {
        for (i64 k = 0; k < recipe.block_count; k++) {
            const Block &b = recipe.blocks[k], &from = recipe.blocks[b.picked_from];
            for (i64 j = 0; j < b.picked_count; j++)
                if (b.wide) ((double*)b.sums)[j] = ((const double*)from.sums)[b.picked[j]];
                else ((float*)b.sums)[j] = ((const float*)from.sums)[b.picked[j]];
        }
        for (i64 k = 0; k < recipe.block_count; k++) {
            const Block& b = recipe.blocks[k];
            for (i64 j = 0; j < b.removed_count; j++)
                if (b.wide) ((double*)b.sums)[b.removed[j]] = 0;
                else ((float*)b.sums)[b.removed[j]] = 0;
        }
    }

    // ---- solve: marginals

    // A denormal sum has no digits left: the unit counts as dead.
    template <class A> void weigh(double* out, Share part, double weight) const {
        for (i64 k = part.begin; k < part.end; k++)
            out[k] = out[k] < std::numeric_limits<A>::min() ? 0 : out[k] * weight;
    }

    template <Mode M, class W>
    void marginal(const Pass& pass, const W* w, bool first, double& total) const {
        using A = Wide<W>;
        const Block& b = recipe.blocks[pass.block];
        const Form& f = recipe.forms[b.form];
        const i64 n = f.cols;
        const Share rows = share(f.rows, n, thread, threads);
        const bool keep_total = first && !b.sums;
        double* wide = scratch();
        A* narrowed = (A*)(wide + (f.rows > n ? f.rows : n));
        if (keep_total) total = 0;
        if (!pass.over_rows) {
            if (rows.begin == rows.end) return;
            const A* v = nullptr;
            double shift = 1;
            if (!first && f.col.count) shift = weights(f.col, f.cols, wide, narrowed), v = narrowed;
            if (v) along_rows<M>(w, v, rows.begin, rows.end, n, pass.out);
            else along_rows<M>(w, Ones(), rows.begin, rows.end, n, pass.out);
            if (keep_total) total = all(pass.out + rows.begin, rows.end - rows.begin);
            weigh<A>(pass.out, rows, shift * b.weight);
        } else {
            double* out = pass.out + thread * n;
            const A* a = nullptr;
            double shift = 1;
            if (!first && f.row.count) shift = weights(f.row, f.rows, wide, narrowed), a = narrowed;
            A* acc = narrowed + f.rows;
            across<M>(w, a, rows.begin, rows.end, n, acc, out);
            if (keep_total) total = all(out, n);
            weigh<A>(out, {0, n}, shift * b.weight);
        }
    }

    void run_pass(const Pass& pass, bool first) const {
        const Block& b = recipe.blocks[pass.block];
        double& total = recipe.totals[pass.block * recipe.threads + thread];
        with_cells(b, [&](auto* w) {
            bool direct = !b.sums;
            if (!direct && largest()) marginal<LARGEST_VALUES>(pass, w, first, total);
            else if (!direct) marginal<VALUES>(pass, w, first, total);
            else if (largest()) marginal<MAXIMA>(pass, w, first, total);
            else if (recipe.p == 1) marginal<ABSOLUTES>(pass, w, first, total);
            else marginal<SQUARES>(pass, w, first, total);
        });
    }

    // ---- solve: steps

    // Adds the marginals of a pass at positions [begin, end), times their own factors, to a side.
    void add(const Pass& pass, i64 begin, i64 end, const double* factor, double* side) const {
        const Form& f = recipe.forms[recipe.blocks[pass.block].form];
        const int used = pass.over_rows && f.rows * f.cols >= ALONE ? threads : 1;
        for (int t = 0; t < used; t++) {               // columns: every thread has summed its rows
            const double* out = pass.out + t * f.cols + begin;
            if (largest())
                for (i64 k = 0; k < end - begin; k++) side[k] = join(side[k], out[k] * factor[k], true);
            else
                for (i64 k = 0; k < end - begin; k++) side[k] += out[k] * factor[k];
        }
    }

    void gather(const Group& g, Share part) const {
        const i64 sides = g.positive + g.negative;
        for (i64 s = 0; s < sides; s++)
            for (i64 k = part.begin; k < part.end; k++) g.sides[s * g.channels + k] = 0;
        for (i64 t = g.touch_begin; t < g.touch_end; t++) {
            const Touch& touch = recipe.touches[t];
            const Pass& pass = recipe.passes[touch.pass];
            const Form& f = recipe.forms[recipe.blocks[pass.block].form];
            const Terms& own = pass.over_rows ? f.col : f.row;
            double* side = g.sides + touch.side * g.channels;
            if (!touch.channels) {                     // positions and channels both count up
                i64 shift = touch.position - touch.channel, last = touch.channel + touch.count;
                i64 begin = part.begin > touch.channel ? part.begin : touch.channel;
                i64 end = last < part.end ? last : part.end;
                if (begin >= end) continue;
                double* factor = scratch();
                fill(own, begin + shift, end + shift, factor - (begin + shift));
                add(pass, begin + shift, end + shift, factor, side + begin);
            } else {
                for (i64 j = 0; j < touch.count; j++) {
                    i64 position = touch.positions[j], k = touch.channels[j];
                    if (k < part.begin || k >= part.end) continue;
                    double factor;
                    fill(own, position, position + 1, &factor - position);
                    add(pass, position, position + 1, &factor, side + k);
                }
            }
        }
    }

    void solve(const Group& g, Share part) const {
        const i64 sides = g.positive + g.negative;
        const Slopes slopes{g.coefficients, g.positive, sides, largest()};
        const double a = g.coefficients[0], b = -g.coefficients[sides - 1];
        const bool two = sides == 2, plain = two && a == 1 && b == 1 && g.damping == 1 && !recipe.exact;
        double* out = recipe.steps + g.start;
        if (plain) {
            const double *up = g.sides, *down = g.sides + g.channels;
#pragma omp simd
            for (i64 k = part.begin; k < part.end; k++) {
                const bool moves = (up[k] > 0) & (down[k] > 0), known = (up[k] == up[k]) & (down[k] == down[k]);
                out[k] = std::sqrt(moves ? down[k] / up[k] : known ? 1.0 : NAN);
            }
            return;
        }
        for (i64 k = part.begin; k < part.end; k++) {
            double logs[MOST_SIDES], most_up = 0, most_down = 0;
            bool nan = false;
            for (i64 s = 0; s < sides; s++) {
                double m = g.sides[s * g.channels + k];
                nan |= m != m;
                double& most = s < g.positive ? most_up : most_down;
                most = m > most ? m : most;
                logs[s] = std::log(m);
            }
            double step = 0;                           // of p * u
            if (most_up > 0 && most_down > 0) {
                if (two && largest()) step = (logs[1] - logs[0]) / (a + b);
                else if (two) step = (logs[1] + std::log(b) - logs[0] - std::log(a)) / (a + b);
                else step = slopes.root(logs);
            }
            step /= g.damping;
            if (recipe.exact) {
                double unit = std::log(2.0) * (largest() ? 1 : recipe.p), times = step / unit;
                step = (g.symmetric ? std::nearbyint(times) : std::trunc(times)) * unit;
            }
            out[k] = nan ? NAN : std::exp(step);
        }
    }

    void move(const Group& g, Share part) const {
        for (i64 c = 0; c < recipe.power_count; c++) {
            double coefficient = recipe.coefficients[c], *e = recipe.e + c * width() + g.start;
            const double* step = recipe.steps + g.start;
            if (coefficient == 1)
                for (i64 k = part.begin; k < part.end; k++) e[k] *= step[k];
            else if (coefficient == -1)
                for (i64 k = part.begin; k < part.end; k++) e[k] /= step[k];
            else
                for (i64 k = part.begin; k < part.end; k++) e[k] *= std::pow(step[k], coefficient);
        }
    }

    // ---- decide

    double largest_log_scale() const {                 // max |u|; NaN or inf if any is
        double most = 1, least = 1, bad = 0;
#pragma omp simd reduction(max : most) reduction(min : least) reduction(+ : bad)
        for (i64 v = 0; v < recipe.scales; v++) {
            double x = recipe.e[v];
            most = x > most ? x : most, least = x < least ? x : least, bad += x - x;
        }
        const double above = std::log(most), below = -std::log(least);
        return (above > below ? above : below) / (largest() ? 1 : recipe.p) + bad;
    }

    bool decide() const {
        const double reach = largest_log_scale();
        if (!(reach < recipe.farthest)) return false;
        for (i64 k = 0; k < recipe.block_count; k++) {
            const Block& b = recipe.blocks[k];
            if (b.picked_count) continue;
            double total = 0;
            for (int t = 0; t < threads; t++) accumulate(total, recipe.totals[k * recipe.threads + t]);
            double log_size = total > 0 ? std::log(total) / (largest() ? 1 : recipe.p) : total - INFINITY;
            if (log_size + b.rate * reach < b.limit) continue;
            // The norm of a weight in float16 may well be beyond what one number of it can be.
            if (!std::isfinite(total)) return false;
            if (!(log_largest(b.source) + b.rate * reach < b.limit)) return false;
        }
        for (i64 k = 0; k < recipe.check_count; k++) {
            const Check& check = recipe.checks[k];
            if (!(log_largest(check.source) + check.rate * reach < check.limit)) return false;
        }
        return true;
    }

    double log_largest(i64 number) const {             // log of max |w|; NaN or inf if any is
        const Source& source = recipe.sources[number];
        const Form& f = recipe.forms[source.form];
        double most = 0;
        with_dtype(source.dtype, [&](auto w) {
            most = along<MAXIMA>((const decltype(w)*)source.data, Ones(), f.rows * f.cols * f.run);
        });
        return std::log(most);
    }

    // ---- apply

    void make_powers() const {                         // d = exp(coefficient * exponent * u)
        const double unit = largest() ? 1 : recipe.p;
        const i64 n = width(), begin = n * thread / threads, end = n * (thread + 1) / threads;
        const double* e = recipe.e;
        for (i64 k = 0; k < recipe.product_count; k++) {
            const double power = recipe.products[k] / unit;
            double* out = recipe.d + k * n;
            if (recipe.exact)                             // to the last bit: e is a power of 2^p
                for (i64 v = begin; v < end; v++)
                    out[v] = std::exp2(std::nearbyint(std::log2(e[v]) / unit) * recipe.products[k]);
            else if (power == 0.5)
                for (i64 v = begin; v < end; v++) out[v] = std::sqrt(e[v]);
            else if (power == -0.5)
                for (i64 v = begin; v < end; v++) out[v] = 1 / std::sqrt(e[v]);
            else if (power == -1)
                for (i64 v = begin; v < end; v++) out[v] = 1 / e[v];
            else
                for (i64 v = begin; v < end; v++) out[v] = power == 1 ? e[v] : std::pow(e[v], power);
        }
    }

    void make_scaler(const Scaler& s) const {
        const Form& f = recipe.forms[s.form];
        auto flat = [&](i64 k) { return factor_power(s.exponent, k); };
        fill(f.row, 0, f.rows, s.row, flat);
        double* wide = scratch();
        fill(f.col, 0, f.cols, wide, flat);
        for (i64 j = 0; j < f.cols; j++)
            for (i64 r = 0; r < f.run; r++)
                if (s.wide) ((double*)s.col)[j * f.run + r] = wide[j];
                else ((float*)s.col)[j * f.run + r] = float(wide[j]);
    }

    template <class W> void multiply(W* w, const Scaler& s, Share rows) const {
        using A = Wide<W>;
        const Form& f = recipe.forms[s.form];
        const i64 n = f.cols * f.run;
        const A* col = (const A*)s.col;
        for (i64 o = rows.begin; o < rows.end; o++) {
            W* line = w + o * n;
            const A by_row = A(s.row[o]);
#pragma omp simd
            for (i64 j = 0; j < n; j++) narrow(widen(line[j]) * (by_row * col[j]), line[j]);
        }
    }

    // Last layers first: they were measured last, and are most likely to be in the cache still.
    void apply() const {
        auto write = [&](i64 k) -> const Write& { return recipe.writes[recipe.write_count - 1 - k]; };
        auto scaler = [&](i64 k) -> const Scaler& { return recipe.scalers[write(k).scaler]; };
        auto form = [&](i64 k) -> const Form& { return recipe.forms[scaler(k).form]; };
        auto skipped = [](i64) { return false; };
        in_pieces(common.applied, recipe.write_count, form, skipped, [&](i64 k, Share rows) {
            const Source& source = recipe.sources[write(k).source];
            with_dtype(source.dtype, [&](auto w) { multiply((decltype(w)*)source.data, scaler(k), rows); });
        });
    }

    // ---- all of it

    void begin() const {
        for (i64 v = thread; v < width() * recipe.power_count; v += threads) recipe.e[v] = 1;
        for (i64 k = 0; k < recipe.block_count; k++) recipe.totals[k * recipe.threads + thread] = 0;
    }

    // pass(number, first): runs a pass; first: no factor has moved since the block was measured.
    template <class P> void cycles(P pass) const {
        for (i64 cycle = 0; cycle < recipe.cycles; cycle++)
            for (i64 k = 0; k < recipe.batch_count; k++) {
                const Batch& batch = recipe.batches[k];
                for (i64 j = batch.pass_begin; j < batch.pass_end; j++)
                    pass(j, cycle == 0 && recipe.passes[j].first);
                barrier();
                for (i64 j = batch.group_begin; j < batch.group_end; j++) {
                    const Group& g = recipe.groups[j];
                    Share part{g.channels * thread / threads, g.channels * (thread + 1) / threads};
                    gather(g, part);
                    solve(g, part);
                }
                if (!batch.alone) barrier();           // nobody moves before all have solved
                for (i64 j = batch.group_begin; j < batch.group_end; j++) {
                    const Group& g = recipe.groups[j];
                    move(g, {g.channels * thread / threads, g.channels * (thread + 1) / threads});
                }
                barrier();
            }
    }

    // The factors of every write that is wanted; false, and none, where a number is not finite or too
    // large.
    template <class Wanted> bool make_factors(Wanted wanted) const {
        if (thread == 0) common.decision = decide();
        barrier();
        if (!common.decision) return false;
        make_powers();
        barrier();
        for (i64 k = thread; k < recipe.scaler_count; k += threads)
            if (wanted(recipe.scalers[k])) make_scaler(recipe.scalers[k]);
        barrier();
        return true;
    }

    void run() const {
        begin();
        measure([](i64) { return false; });
        barrier();
        if (thread == 0) pick();
        barrier();
        cycles([&](i64 number, bool first) { run_pass(recipe.passes[number], first); });
        if (make_factors([](const Scaler&) { return true; })) apply();
    }

    static void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
    }
};

// What `work(thread, threads)` does, by so many threads.
template <class Work> void in_parallel(int threads, Work work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
#else
    work(0, 1);
#endif
}

}  // namespace

#include "counters.h"
#include "fused.h"
#include "places.h"

extern "C" {

// 1: everything was multiplied; 0: nothing was written.
int enorm_run(const Recipe* recipe, int threads) {
    if (threads > recipe->threads) threads = int(recipe->threads);
    Common common(threads);
    in_parallel(threads, [&](int thread, int team) { Step{*recipe, common, thread, team}.run(); });
    return common.decision;
}

// Parameters are updated in any case. 1: the factors of the next update are known; 0: a number was
// not finite or too large for them.
int enorm_fused(const Recipe* recipe, const Fused* fused, int threads) {
    if (threads > recipe->threads) threads = int(recipe->threads);
    Common common(threads);
    in_parallel(threads, [&](int thread, int team) {
        FusedStep(*recipe, common, thread, team, *fused).run();
    });
    return common.decision;
}

// max |x| over tensors; NaN or inf if any entry is. data: nullptr for none.
double enorm_largest(const void* const* data, const i64* dtypes, const i64* sizes, i64 count,
                     int threads) {
    std::vector<double> found(threads, 0.0);
    in_parallel(threads, [&](int thread, int team) {
        double most = 0;
        for (i64 k = count - 1; k >= 0; k--) {         // what is updated first is looked at last
            if (!data[k]) continue;
            const Share part = share(sizes[k], 1, thread, team);
            with_dtype(dtypes[k], [&](auto w) {
                const double x = along<MAXIMA>((const decltype(w)*)data[k] + part.begin, Ones(),
                                               part.end - part.begin);
                most = join(most, x, true) + (x - x);
            });
        }
        found[thread] = most;
    });
    double most = 0;
    for (double x : found) most = join(most, x, true) + (x - x);
    return most;
}

int enorm_has_half() {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}
}
