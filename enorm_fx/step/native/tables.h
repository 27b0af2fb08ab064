// What native/tables.py packs, field by field.

#pragma once

#include <cstdint>

using i64 = int64_t;

struct Terms {            // product over k < count of e[ids[k][position]] ^ coefficient[power[k]]
    i64 count, length;
    const i64* power;
    const i64* first;     // ids count up from here; -1: see ids
    const int32_t* ids;   // count x length; ids of pinned positions point at a scale that stays 1
};
struct Form { i64 rows, cols, run; Terms row, col; };
struct Source {           // one entry's memory: what is read, checked, multiplied
    void* data;
    i64 dtype, form;
};
enum { FLOAT, DOUBLE, BFLOAT16, HALF };
struct Block {            // measured cells; sums == nullptr: powers are taken from the weight itself
    i64 source, form;
    void* sums;           // rows x cols, float or double (wide)
    i64 wide;
    double weight;        // c^(-p * depth)
    i64 removed_count, picked_count, picked_from;
    const i64 *removed, *picked;
    double rate, limit;   // log |w| grows by at most rate * max |u|, and must stay below limit
};
struct Pass { i64 block, over_rows, first; double* out; };   // out: threads x cols x run, or rows
struct Touch {            // marginals at `positions` go to `channels` of a side
    i64 pass, side, count, position, channel;
    const int32_t *positions, *channels;               // nullptr: counting up from position, channel
};
struct Group {
    i64 start, channels, touch_begin, touch_end, positive, negative, symmetric;
    double damping;
    const double* coefficients;                        // positive ones, then negative ones
    double* sides;                                     // coefficients x channels
};
struct Batch {            // groups that take their steps from the same state
    i64 pass_begin, pass_end, group_begin, group_end;
    i64 alone;            // moving a channel changes no other channel's own factor
};
struct Check { i64 source; double rate, limit; };      // entries that no pass reads
struct Write { i64 source, scaler; };
struct Scaler { i64 form, exponent, wide; double* row; void* col; };
struct Recipe {
    i64 scales, cycles, threads, exact, power_count, product_count;
    double p;                                          // inf: maxima
    double farthest;                                   // max |u|: beyond, a factor leaves its dtype
    const double *coefficients, *products;             // distinct ones; products: times exponents
    const i64* product;                                // of each exponent and coefficient
    double *e, *d;                                     // power_count, product_count x (scales + 1)
    double *steps, *totals, *scratch;                  // scales; blocks x threads; threads x width
    i64 scratch_width;
    const Form* forms; const Source* sources; const Block* blocks; i64 block_count;
    const Pass* passes; const Touch* touches; const Group* groups;
    const Batch* batches; i64 batch_count;
    const Check* checks; i64 check_count;
    const Scaler* scalers; i64 scaler_count;
    const Write* writes; i64 write_count;
};

// What an optimizer's step does to a parameter, in one pass with the factors that wait for it.
enum { PLAIN, MOMENTUM, ADAM, AMSGRAD };
struct Rates {            // y = sign * g + decay * w
    double sign, decay, shrink, rate;                  // w <- shrink * w - rate * (the update)
    double keep, take, direct, through;                // m <- keep * m + take * y
    double keep2, take2, root, eps;                    // v <- keep2 * v + take2 * y * y
};
struct Update {           // buffers: the momentum; or the two means, and the maximum of the second
    void *weight, *first, *second, *third;
    i64 dtype, kind, size, width;                      // width: entries in a row of factors
    const Scaler* factors;                             // of w; nullptr: none wait
};
struct Rest { i64 update, block; };                    // block: whose cells it has, or -1
struct Fused {
    const Update* updates;
    const void* const* gradients;                      // by update; nullptr: there is none
    const Rates* rates;
    const i64* rates_of;                               // by update
    const i64* of_pass;                                // by pass, what it updates before, or -1
    const Rest* rest;                                  // updates that no pass does
    i64 rest_count;
    const i64* summed;                                 // by block: 1 if one of the rest sums it
    double* reach;                                     // out: max |u|
};
