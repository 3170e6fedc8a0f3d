// Activations in the form that a kind of weights multiplies with.
#include <cmath>
#include <limits>

#include "linear.h"

namespace gristmill {
namespace {

// The first `count` of 16 floats; zeros after them.
GRISTMILL_INLINE Floats load_part(const float* from, long count) {
    if (count >= LANES) return load<Floats>(from);
    Floats part = {};
    std::memcpy(&part, from, count * 4);
    return part;
}

// Bits of the largest magnitude; as whole numbers they order as magnitudes do, and infinity and NaN stand above all.
int32_t largest_magnitude(const float* x, long count) {
    Ints largest = {};
    for (long k = 0; k < count; k += LANES) {
        const Ints bits = (Ints)load_part(x + k, count - k) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    int32_t most = 0;
    for (int lane = 0; lane < LANES; lane++) most = largest[lane] > most ? largest[lane] : most;
    return most;
}

// x (count) as int8 in `to` (`room` bytes, zeros at the end), its scale, and -offset * their sum.
void quantise(const float* x, long count, long room, int offset, int8_t* to, float* scale, int32_t* start) {
    const int32_t bits = largest_magnitude(x, count);
    if (bits >= 0x7f800000) {
        std::memset(to, 0, room);
        *scale = std::numeric_limits<float>::quiet_NaN();
        *start = 0;
        return;
    }
    float largest;
    std::memcpy(&largest, &bits, 4);
    *scale = std::fmax(largest / 127, std::numeric_limits<float>::min());
    constexpr float ROUND = 0x1.8p23f;  // added to a small number it leaves the nearest whole one in the low bits
    const Floats divisor = splat(*scale);
    Ints sum = {};
    for (long k = 0; k < count; k += LANES) {
        const Ints whole = (Ints)(load_part(x + k, count - k) / divisor + ROUND) - (Ints)splat(ROUND);
        sum += whole;
        const Bytes bytes = __builtin_convertvector(whole, Bytes);
        std::memcpy(to + k, &bytes, room - k < LANES ? room - k : LANES);
    }
    const long written = round_up(count, LANES);
    if (written < room) std::memset(to + written, 0, room - written);
    int32_t total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    *start = -offset * total;
}

long groups_of(const Rows& x) { return x.kind == INT4 ? (x.in + x.group - 1) / x.group : 1; }

long row_bytes(const Linear& l) {
    switch (l.kind) {
        case FLOAT32:
        case INT8_WEIGHTS: return l.in * 4L;
        case BFLOAT16: return round_up(l.in, 2) * 2;
        case INT8: return round_up(l.in, 4);
        default: return round_up(l.in, l.group);
    }
}

}  // namespace

Rows rows_at(const Linear& l, void* buffer, long rows) {
    Rows x = {l.kind, l.in, l.group, 0, (char*)buffer, nullptr, nullptr};
    x.stride = (row_bytes(l) + 63) / 64 * 64;
    if (x.stride / 64 % 2 == 0) x.stride += 64;  // rows at a power of two apart would share few sets of the cache
    if (l.kind == INT8 || l.kind == INT4) {
        x.scales = (float*)(x.values + rows * x.stride);
        x.sums = (int32_t*)(x.scales + rows * groups_of(x));
    }
    return x;
}

size_t rows_bytes(const Linear& l, long rows) {
    const Rows x = rows_at(l, nullptr, rows);
    return (size_t)round_up(rows * (x.stride + (x.scales ? 8 * groups_of(x) : 0)), 64);
}

void prepare_row(const Rows& into, long row, const float* x) {
    char* to = into.values + row * into.stride;
    switch (into.kind) {
        case FLOAT32:
        case INT8_WEIGHTS: std::memcpy(to, x, into.in * 4L); break;
        case BFLOAT16: {
            uint16_t* halves = (uint16_t*)to;
            for (long k = 0; k < into.in; k++) halves[k] = to_bf16(x[k]);
            if (into.in % 2) halves[into.in] = 0;
            break;
        }
        case INT8:
            quantise(x, into.in, round_up(into.in, 4), 128, (int8_t*)to, into.scales + row, into.sums + row);
            break;
        default: {
            const long groups = groups_of(into), first = row * groups;
            for (long g = 0; g < groups; g++) {
                const long k = g * into.group, count = into.in - k < into.group ? into.in - k : into.group;
                quantise(x + k, count, into.group, 8, (int8_t*)to + k, into.scales + first + g, into.sums + first + g);
            }
        }
    }
}

void prepare_rows(const Rows& into, const float* x, long ldx, long rows, int thread, int threads) {
    const Share share(rows, thread, threads);
    for (long row = share.begin; row < share.end; row++) prepare_row(into, row, x + row * ldx);
}

}  // namespace gristmill
