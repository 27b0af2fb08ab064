// Numbers and loops over them: dtypes, powers, sums along rows and across them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tables.h"

namespace {

constexpr i64 TILE = ENORM_TILE, FLUSH = 64;                // columns at a time; rows before widening

struct bf16 { uint16_t bits; };
#ifdef __FLT16_MAX__
using half = _Float16;
#endif

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, bf16& out) {               // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
#ifdef __FLT16_MAX__
inline float widen(half x) { return float(x); }
inline void narrow(float x, half& out) { out = half(x); }
#endif
template <class W> using Wide = decltype(widen(W()));

// What a cell contributes, and how contributions are joined.
enum Mode { SQUARES, ABSOLUTES, MAXIMA, VALUES, LARGEST_VALUES };
constexpr bool joins_by_max(Mode m) { return m == MAXIMA || m == LARGEST_VALUES; }
template <Mode M, class A> inline A value(A x) {
    if (M == SQUARES) return x * x;
    return M == ABSOLUTES || M == MAXIMA ? std::abs(x) : x;
}
inline double join(double a, double b, bool largest) { return largest ? (b > a ? b : a) : a + b; }

// What is not finite in x makes it NaN or inf, which a maximum would pass over.
template <Mode M> inline double joined(double sum, double x) {
    return joins_by_max(M) ? join(sum, x, true) + (x - x) : sum + x;
}

template <class F> void with_dtype(i64 dtype, F&& f) {
    if (dtype == FLOAT) f(float());
    else if (dtype == DOUBLE) f(double());
    else if (dtype == BFLOAT16) f(bf16());
#ifdef __FLT16_MAX__
    else f(half());
#endif
}

// Weights that are all one: a product with them costs nothing.
struct Ones { int operator[](i64) const { return 1; } };

// Sum (or maximum) of value(w[j]) * v[j]. What is not finite makes the result NaN or inf.
template <Mode M, class W, class V> double along(const W* w, V v, i64 n) {
    using A = Wide<W>;
    double total = 0;
    for (i64 start = 0; start < n; start += TILE) {
        i64 stop = start + TILE < n ? start + TILE : n;
        A sum = 0, bad = 0, most = 0;
        if (joins_by_max(M)) {
#pragma omp simd reduction(max : most) reduction(+ : bad)
            for (i64 j = start; j < stop; j++) {
                A x = value<M>(A(widen(w[j]))) * A(v[j]);
                most = x > most ? x : most;            // passes over NaN: hence `bad`
                bad += x - x;
            }
            total = join(total, double(most + bad), true) + double(bad);
        } else {
#pragma omp simd reduction(+ : sum)
            for (i64 j = start; j < stop; j++) sum += value<M>(A(widen(w[j]))) * A(v[j]);
            total += sum;
        }
    }
    return total;
}

// The sums of four rows, `stride` entries from one another: memory answers four streams faster than
// one.
template <Mode M, class W, class V>
void along4(const W* w, i64 stride, V v, i64 n, double out[4]) {
    using A = Wide<W>;
    const W *w0 = w, *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    for (int k = 0; k < 4; k++) out[k] = 0;
    for (i64 start = 0; start < n; start += TILE) {
        i64 stop = start + TILE < n ? start + TILE : n;
        A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (i64 j = start; j < stop; j++) {
            A x = A(v[j]);
            s0 += value<M>(A(widen(w0[j]))) * x;
            s1 += value<M>(A(widen(w1[j]))) * x;
            s2 += value<M>(A(widen(w2[j]))) * x;
            s3 += value<M>(A(widen(w3[j]))) * x;
        }
        out[0] += s0, out[1] += s1, out[2] += s2, out[3] += s3;
    }
}

// The sums (or maxima) of rows begin <= o < end.
template <Mode M, class W, class V, class Out>
void along_rows(const W* w, V v, i64 begin, i64 end, i64 n, Out* out) {
    const i64 apart = joins_by_max(M) ? 0 : (end - begin) / 4;
    i64 o = begin;
    for (; o < begin + apart; o++) {
        double sums[4];
        along4<M>(w + o * n, apart * n, v, n, sums);
        for (int k = 0; k < 4; k++) out[o + k * apart] = Out(sums[k]);
    }
    for (o += 3 * apart; o < end; o++) out[o] = Out(along<M>(w + o * n, v, n));
}

// sums[j] += value(w[j]) * a (or the maximum of both).
template <Mode M, class W, class A> void add_line(const W* w, A a, i64 n, A* sums) {
    if (joins_by_max(M)) {
#pragma omp simd
        for (i64 j = 0; j < n; j++) {
            A x = value<M>(A(widen(w[j]))) * a, bad = x - x;
            sums[j] = (x > sums[j] ? x : sums[j]) + bad;
        }
    } else {
#pragma omp simd
        for (i64 j = 0; j < n; j++) sums[j] += value<M>(A(widen(w[j]))) * a;
    }
}

// out[j] = sum (or maximum) over rows of value(w[row][j]) * a[row]; acc: room for a tile.
template <Mode M, class W, class A>
void across(const W* w, const A* a, i64 begin, i64 end, i64 n, A* acc, double* out) {
    const i64 apart = joins_by_max(M) ? 0 : (end - begin) / 4, in_fours = begin + apart;
    for (i64 j = 0; j < n; j++) out[j] = 0;
    for (i64 start = 0; start < n; start += TILE) {
        i64 width = start + TILE < n ? TILE : n - start;
        for (i64 o = begin; o < end;) {
            for (i64 j = 0; j < width; j++) acc[j] = 0;
            if (o < in_fours) {
                i64 to = o + FLUSH < in_fours ? o + FLUSH : in_fours;
                for (; o < to; o++) {
                    const W *w0 = w + o * n + start, *w1 = w0 + apart * n, *w2 = w1 + apart * n,
                            *w3 = w2 + apart * n;
                    A a0 = a ? a[o] : A(1), a1 = a ? a[o + apart] : A(1);
                    A a2 = a ? a[o + 2 * apart] : A(1), a3 = a ? a[o + 3 * apart] : A(1);
#pragma omp simd
                    for (i64 j = 0; j < width; j++)
                        acc[j] += value<M>(A(widen(w0[j]))) * a0 + value<M>(A(widen(w1[j]))) * a1 +
                                  value<M>(A(widen(w2[j]))) * a2 + value<M>(A(widen(w3[j]))) * a3;
                }
                if (o == in_fours) o = begin + 4 * apart;
            } else {
                const W* w0 = w + o * n + start;
                A a0 = a ? a[o] : A(1);
                add_line<M>(w0, a0, width, acc);
                o++;
            }
            for (i64 j = 0; j < width; j++)
                out[start + j] = joined<M>(out[start + j], acc[j]);
        }
    }
}

constexpr i64 ROUND = 16;                              // runs that are summed together

// out[cell] = sum of the squares of a run. Runs are short (9 entries of a 3 x 3 kernel), which leaves
// compilers with scalar code; so eight runs are summed at once, by three levels of pairwise sums.
#if defined(__clang__) || __GNUC__ >= 12
typedef float float8 __attribute__((vector_size(32)));
inline float8 load8(const float* x) {
    float8 out;
    std::memcpy(&out, x, sizeof(out));
    return out;
}
#define PAIRS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
inline float8 level1(float8 a, float8 b) {
    return PAIRS(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + PAIRS(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}
inline float8 level2(float8 a, float8 b) {
    return PAIRS(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + PAIRS(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
inline float8 level3(float8 a, float8 b) {
    return PAIRS(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PAIRS(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
template <int RUN> void sum_round(const float* x, i64 any_run, float* out) {
    const i64 run = RUN ? RUN : any_run, whole = run / 8 * 8;
    for (i64 k = 0; k < ROUND; k++) {
        float rest = 0;
        for (i64 r = whole; r < run; r++) rest += x[k * run + r] * x[k * run + r];
        out[k] = rest;
    }
    auto eights = [&](const float* y) {
        float8 sum = load8(y) * load8(y);
        for (i64 r = 8; r < whole; r += 8) sum += load8(y + r) * load8(y + r);
        return sum;
    };
    for (i64 k = 0; k < ROUND; k += 8) {
        const float* y = x + k * run;
        float8 half = level2(level1(eights(y), eights(y + run)),
                             level1(eights(y + 2 * run), eights(y + 3 * run)));
        y += 4 * run;
        float8 other = level2(level1(eights(y), eights(y + run)),
                              level1(eights(y + 2 * run), eights(y + 3 * run)));
        float8 sums = level3(half, other) + load8(out + k);
        std::memcpy(out + k, &sums, sizeof(sums));
    }
}
#undef PAIRS
// The cells from `begin` on; returns the first that is left. A round from each quarter by turn.
i64 sum_squares(const float* w, i64 begin, i64 end, i64 run, float* out) {
    if (run < 8) return begin;
    if (run > 16) return along_rows<SQUARES>(w, Ones(), begin, end, run, out), end;
    auto round = [&](i64 c) {
        run == 9 ? sum_round<9>(w + c * run, run, out + c) : sum_round<0>(w + c * run, run, out + c);
    };
    const i64 quarter = (end - begin) / (4 * ROUND) * ROUND;
    for (i64 cell = begin; cell < begin + quarter; cell += ROUND)
        for (i64 c = cell; c < cell + 4 * quarter; c += quarter) round(c);
    for (begin += 4 * quarter; begin + ROUND <= end; begin += ROUND) round(begin);
    return begin;
}
#else
i64 sum_squares(const float*, i64 begin, i64, i64, float*) { return begin; }
#endif
template <class W, class A> i64 sum_squares(const W*, i64 begin, i64, i64, A*) { return begin; }

}  // namespace
