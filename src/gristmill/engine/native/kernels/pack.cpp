// The canonical weight of a layer, laid out in panels. A panel is a sequence of vectors, one 4-byte unit for each of
// its channels: one float32, two bfloat16, four int8 (as value + 128) or eight int4 (the first four in low nibbles).
// int8_weights has one byte for each channel instead, input after input.
#include "linear.h"

namespace gristmill {
namespace {

long panels_of(const Linear& l) { return (l.out + PANEL - 1) / PANEL; }
long groups_of(const Linear& l) { return (l.in + l.group - 1) / l.group; }
int scale_bytes(const Linear& l) { return l.scale_type == FLOAT32 ? 4 : 2; }

// Units of one channel of float32, bfloat16 or int8, `flip` applied to each; what is beyond the row is zero.
void pack_units(const char* row, long bytes, uint32_t flip, uint32_t* panel) {
    for (long at = 0; at < bytes; at += 4, panel += PANEL) {
        uint32_t unit = 0;
        std::memcpy(&unit, row + at, bytes - at < 4 ? bytes - at : 4);
        *panel = unit ^ flip;
    }
}

// One channel of int8_weights; what is beyond the row is zero.
void pack_bytes(const int8_t* row, long count, int8_t* panel) {
    for (long k = 0; k < round_up(count, 2); k++) panel[k * PANEL] = k < count ? row[k] : 0;
}

uint16_t to_half(float x) {  // x is a number that float16 holds
    uint32_t bits;
    const float scaled = x * 0x1p-112f;  // float16's exponent in float32's place; its subnormals come out right too
    std::memcpy(&bits, &scaled, 4);
    return (uint16_t)((bits >> 13 & 0x7fff) | (bits >> 16 & 0x8000));
}

// One channel of int4 with its scales after each group.
void pack_int4(const Linear& l, const uint8_t* row, const float* scales, int channel, char* panel) {
    const long row_bytes = (l.in + 1) / 2;
    const auto value = [&](long k) { return k / 2 < row_bytes ? row[k / 2] >> (k % 2 * 4) & 15 : 8; };
    for (long g = 0; g < groups_of(l); g++) {
        for (long k = g * l.group; k < (g + 1) * l.group; k += 8, panel += 4 * PANEL)
            for (int b = 0; b < 4; b++)
                ((uint8_t*)panel)[4 * channel + b] = (uint8_t)(value(k + b) | value(k + 4 + b) << 4);
        if (l.scale_type == FLOAT32) {
            ((float*)panel)[channel] = scales[g];
        } else {
            ((uint16_t*)panel)[channel] = l.scale_type == FLOAT16 ? to_half(scales[g]) : to_bf16(scales[g]);
        }
        panel += PANEL * scale_bytes(l);
    }
}

bool scaled_by_channel(const Linear& l) { return l.kind == INT8 || l.kind == INT8_WEIGHTS; }

}  // namespace

size_t panel_bytes(const Linear& l) {
    switch (l.kind) {
        case FLOAT32: return (size_t)l.in * PANEL * 4;
        case BFLOAT16: return (size_t)(l.in + 1) / 2 * PANEL * 4;
        case INT8: return (size_t)(l.in + 3) / 4 * PANEL * 4;
        case INT8_WEIGHTS: return (size_t)round_up(l.in, 2) * PANEL;  // whole lines of 64 bytes
        default: return (size_t)groups_of(l) * PANEL * (l.group / 2 + scale_bytes(l));
    }
}

size_t packed_bytes(const Linear& l) {
    const size_t vectors = scaled_by_channel(l) + (l.has_bias != 0);
    return panels_of(l) * (panel_bytes(l) + vectors * PANEL * 4);
}

void place(Linear& l, const void* packed) {
    const float* next = (const float*)((const char*)packed + panels_of(l) * panel_bytes(l));
    l.weights = packed;
    l.scales = scaled_by_channel(l) ? next : nullptr;
    l.bias = l.has_bias ? next + (l.scales ? panels_of(l) * PANEL : 0) : nullptr;
}

void pack(const Linear& l, const void* weight, const float* scales, const float* bias, void* packed, int thread,
          int threads) {
    const Share share(panels_of(l), thread, threads);
    const long sizes[] = {l.in * 4L, l.in * 2L, l.in, (l.in + 1) / 2, l.in};
    for (long channel = share.begin * PANEL; channel < share.end * PANEL; channel++) {
        char* panel = (char*)packed + channel / PANEL * panel_bytes(l);
        const bool padding = channel >= l.out;  // channels that pad the last panel repeat the last one
        const long source = padding ? l.out - 1 : channel;
        const char* row = (const char*)weight + source * sizes[l.kind];
        if (l.kind == INT4) {
            pack_int4(l, (const uint8_t*)row, scales + source * groups_of(l), channel % PANEL, panel);
        } else if (l.kind == INT8_WEIGHTS) {
            pack_bytes((const int8_t*)row, l.in, (int8_t*)panel + channel % PANEL);
        } else {
            pack_units(row, sizes[l.kind], l.kind == INT8 ? 0x80808080 : 0, (uint32_t*)panel + channel % PANEL);
        }
        if (l.scales) const_cast<float*>(l.scales)[channel] = scales[source];
        if (l.bias) const_cast<float*>(l.bias)[channel] = bias[source];
    }
}

}  // namespace gristmill
