// Linear layers with packed weights: float32, bfloat16, int8 (with rounded activations or as they are) and int4.
//
// Weights lie in panels of 32 output channels, along the input inside a panel, so that one row of activations streams
// them once from memory and many rows run a register-tiled product. Activations and outputs are float32 between layers;
// `Rows` holds activations in the form that a kind of weights multiplies with:
//   float32, bfloat16: the number itself, rounded to the kind;
//   int8_weights: the number itself, in float32;
//   int8: round(x / scale) with scale = max |x| / 127 of the row;
//   int4: the same per group of the row.
// The order of additions is fixed by the layer alone: a row's result does not depend on the rows beside it, nor on the
// number of threads.
//
// Functions with (thread, threads) are called by all threads of an open parallel region, each does its share, and none
// waits: put a barrier between prepare_rows and multiply, and after multiply.
#pragma once

#include "common.h"

namespace gristmill {

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, INT8_WEIGHTS = 4, FLOAT16 = 5 };

constexpr int PANEL = 32;  // output channels of a panel: two vectors

// A packed layer. Python fills the same struct; pointers lead into one packed buffer, which is aligned to 64 bytes.
struct Linear {
    int32_t kind, out, in;
    int32_t group;        // int4: inputs that share a scale, a multiple of 8; else 0
    int32_t scale_type;   // int4: how its scales are kept, FLOAT32, BFLOAT16 or FLOAT16
    int32_t has_bias;
    const void* weights;
    const float* scales;  // int8, int8_weights: (out), padded to whole panels
    const float* bias;    // (out), padded to whole panels; null without one
};

// Bytes of the packed buffer of a layer; only the six numbers of `linear` are read.
size_t packed_bytes(const Linear& linear);

// Bytes from one panel of weights to the next.
size_t panel_bytes(const Linear& linear);

// Set the three pointers of a layer whose packed buffer is at `packed`.
void place(Linear& linear, const void* packed);

// Fill `packed`, where `linear` was placed, from a canonical weight:
//   float32 (out, in); bfloat16 (out, in); int8 and int8_weights: int8 (out, in) with scales (out);
//   int4 (out, (in + 1) / 2) two in a byte, low nibble first, value + 8, with scales (out, ceil(in / group)).
// `bias` (out) where has_bias. Scales are float32; for int4 they must be numbers that scale_type holds.
void pack(const Linear& linear, const void* weight, const float* scales, const float* bias, void* packed, int thread,
          int threads);

// Activations of some tokens, prepared for a kind of weights. Layers of the same kind, `in` and `group` share them.
struct Rows {
    int32_t kind, in, group;
    long stride;     // bytes from row to row
    char* values;
    float* scales;   // int8: (rows); int4: (rows, groups)
    int32_t* sums;   // where the integer product starts, of the same shape: it takes the weights' offset back
};

// Bytes of a buffer (aligned to 64) that holds `rows` rows for `linear`, and the rows laid out in it.
size_t rows_bytes(const Linear& linear, long rows);
Rows rows_at(const Linear& linear, void* buffer, long rows);

// Prepare one row from x (in). May be called by any thread, for a normalised row while it is in the cache. A row with a
// value that is not finite gives outputs that are not finite.
void prepare_row(const Rows& into, long row, const float* x);

// Prepare x (rows, in), row i at x + i * ldx.
void prepare_rows(const Rows& into, const float* x, long ldx, long rows, int thread, int threads);

// y (rows, out), row i at y + i * ldy, becomes (or with `accumulate` grows by) x W' + bias.
void multiply(const Linear& linear, const Rows& x, long rows, float* y, long ldy, bool accumulate, int thread,
              int threads);

// Index and value of the largest logit of each row, the first of equal ones; index -1 for a row with a NaN.
void argmax_rows(const float* logits, long ld, long rows, long vocab, int64_t* index, float* value, int thread,
                 int threads);

}  // namespace gristmill
