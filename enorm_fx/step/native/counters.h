// The counters of an optimizer: one number for each parameter, in a place of its own.

#pragma once

#include "tables.h"

namespace {

template <class T> void add_one(void* number) { *(T*)number += 1; }

}  // namespace

extern "C" void enorm_count(void* const* counters, const i64* dtypes, i64 count) {
    for (i64 k = 0; k < count; k++)
        dtypes[k] == DOUBLE ? add_one<double>(counters[k]) : add_one<float>(counters[k]);
}
