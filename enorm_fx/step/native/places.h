// What Python's objects are now: which objects dictionaries hold, and where tensors lie. Asked of
// Python by functions of its stable interface, and of torch by DLPack's C interface for exchange, which
// takes Python's objects as they are (dmlc.github.io/dlpack, version 1.3). Whoever calls holds the GIL,
// and looks for an exception of Python's where the answer is an error.

#pragma once

#include "tables.h"

namespace {

struct DLTensor {
    void* data;
    int32_t device_type, device_id, axes;
    uint8_t kind, bits;
    uint16_t lanes;
    i64 *sizes, *strides;
    uint64_t offset;
};
using FromObject = int (*)(void* object, DLTensor* out);          // 0, or an exception is set
using ValueAt = void* (*)(void* dict, void* key);                 // PyDict_GetItemWithError
using LengthOf = intptr_t (*)(void* dict);                        // PyDict_Size
using ItemOf = void* (*)(void* list, intptr_t number);            // PyList_GetItem

// Hands all that is known of each tensor to `tell`, number by number, the address first. -1: an
// exception is set.
template <class Tell> int describe(FromObject from, ItemOf item, void* list, i64 count, Tell tell) {
    for (i64 k = 0; k < count; k++) {
        DLTensor t;
        void* object = item(list, k);
        if (!object || from(object, &t)) return -1;
        tell(k, true, i64(t.data) + i64(t.offset));
        tell(k, false, i64(t.device_type) << 32 | t.device_id);
        tell(k, false, i64(t.kind) << 32 | i64(t.bits) << 16 | t.lanes);
        tell(k, false, t.axes);
        for (int axis = 0; axis < t.axes; axis++)
            tell(k, false, t.sizes[axis]), tell(k, false, t.strides ? t.strides[axis] : -1);
    }
    return 0;
}

}  // namespace

extern "C" {

// What is known of the tensors, into `out` of so many numbers; how many there would be, or -1.
i64 enorm_places(FromObject from, ItemOf item, void* list, i64 count, i64* out, i64 room) {
    i64 used = 0;
    auto tell = [&](i64, bool, i64 number) {
        if (used < room) out[used] = number;
        used++;
    };
    return describe(from, item, list, count, tell) ? -1 : used;
}

// 1: what is known of as many tensors is this; 0: it is not; -1: an exception is set. addresses: where
// theirs are written, which may then be others; nullptr: they must be the same.
int enorm_same_places(FromObject from, ItemOf item, void* list, i64 count, const i64* known,
                      i64 numbers, i64* addresses) {
    i64 used = 0;
    bool same = true;
    auto tell = [&](i64 k, bool is_address, i64 number) {
        if (is_address && addresses) addresses[k] = number;
        else same &= used < numbers && known[used] == number;
        used++;
    };
    if (describe(from, item, list, count, tell)) return -1;
    return same && used == numbers;
}

// 1: dicts[k] has this value under keys[k] (nullptr: none), for each k, and sized[k] has so many
// entries; 0: not all of it is so.
int enorm_same_items(ValueAt value_at, LengthOf length_of, void* const* dicts, void* const* keys,
                     void* const* values, i64 count, void* const* sized, const i64* lengths,
                     i64 sized_count) {
    for (i64 k = 0; k < count; k++)
        if (value_at(dicts[k], keys[k]) != values[k]) return 0;
    for (i64 k = 0; k < sized_count; k++)
        if (length_of(sized[k]) != lengths[k]) return 0;
    return 1;
}

}
