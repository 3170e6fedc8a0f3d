// Attention of the tokens of a step over keys and values in a paged cache.
//
// Keys are read in tiles that start at multiples of TILE. Each tile gives a row its own maximum, sum and weighted
// values, and tiles are merged in order, so a row's result depends neither on the rows beside it nor on how a step was
// cut into chunks, items and threads. A tile is packed once for all query heads and tokens that read it: keys with 16
// keys to a vector, values with 16 dimensions to a vector. Both products are then the same small matrix product.
//
// Source: Dao et al. 2022 (FlashAttention), Milakov and Gimelshein 2018 (online softmax), Kwon et al. 2023 (paging).
#pragma once

#include <algorithm>
#include <vector>

#include "tile.h"

namespace gristmill {

// Keys and values of one layer, (slots, kv_heads, head_dim); int8 with one scale for each head of a slot.
struct Cache {
    int32_t kind;
    char *keys, *values;
    float *key_scales, *value_scales;
};

struct Heads {
    long heads, kv_heads, dim;
    float factor;  // of the scores
    long group() const { return heads / kv_heads; }
};

constexpr int TILE = 128;       // keys
constexpr int ROWS = 6;         // rows of a register tile, 4 vectors wide
constexpr long BLOCK_ROWS = 384;  // rows that share the packing of a tile
constexpr long SMALL = 32;      // chunks with at most so many rows are split along the keys
constexpr float LOWEST = -1e30f;

// A chunk of a step: `length` tokens from `row` of the flat batch, the first at position `start`; slots[p] is where
// position p lies. `parts`: first partial result, -1 where none are kept.
struct Span {
    long row, start, length;
    const int32_t* slots;
    long parts;
    long tiles() const { return (start + length + TILE - 1) / TILE; }
};

// A piece of work: tokens [first, last) of a chunk, kv heads [head, head_end), tiles [tile, tile_end).
struct Item {
    long span, first, last, head, head_end, tile, tile_end;
};

constexpr long MOST_DIM = 512;
inline long part_size(const Heads& heads) { return round_up(heads.dim, LANES) + 2; }  // values, maximum, sum
inline long part_at(const Heads& heads, const Span& span, long tile, long token, long head) {
    return span.parts + ((tile * span.length + token) * heads.heads + head) * part_size(heads);
}

// The tiles that some token of an item sees.
struct TileRange {
    long begin, end;
    TileRange(const Span& span, const Item& item, long window)
        : begin(std::max(item.tile, window ? std::max(0l, span.start + item.first - window + 1) / TILE : 0)),
          end(std::min(item.tile_end, (span.start + item.last + TILE - 1) / TILE)) {}
};

// Read a tile of some heads once in the order of memory. Packing reads one head after the other, which the processor
// cannot foresee; a plain stream from memory is twice as fast, and prefetch instructions are not.
inline void touch_tile(const Heads& heads, const Cache& cache, const Span& span, long tile, long head, long head_end) {
    const long size = cache.kind == CACHE_FLOAT32 ? 4 : cache.kind == CACHE_BFLOAT16 ? 2 : 1;
    const long stride = heads.kv_heads * heads.dim * size, end = head_end * heads.dim * size;
    const long last = std::min((tile + 1) * TILE, span.start + span.length);
    for (const char* store : {cache.keys, cache.values})
        for (long key = tile * TILE; key < last; key++)
            for (long at = head * heads.dim * size; at < end; at += 64)
                (void)*(const volatile char*)(store + span.slots[key] * stride + at);
}

// The buffers of one thread.
struct Scratch {
    uint32_t *query, *keys, *values, *weights;
    float *scores, *part, *out, *top, *sum;
    float key_scales[TILE], value_scales[TILE];

    static long cell_steps(long dim) { return round_up(dim, 2 * LANES); }
    static size_t words(const Heads& heads) {
        long dim = cell_steps(heads.dim), rows = BLOCK_ROWS + heads.group();
        return rows * dim * 2 + 2 * TILE * dim + ROWS * (2 * TILE + dim) + 2 * round_up(rows, LANES);
    }
    Scratch(const Heads& heads, uint32_t* at) {
        long dim = cell_steps(heads.dim), rows = BLOCK_ROWS + heads.group();
        query = at, keys = query + rows * dim, values = keys + TILE * dim, weights = values + TILE * dim;
        scores = (float*)(weights + ROWS * TILE), part = scores + ROWS * TILE, out = part + ROWS * dim;
        top = out + rows * dim, sum = top + round_up(rows, LANES);
    }
};

template <class T, int kind>
struct Attention {
    const Heads& heads;
    const Cache& cache;
    const Span& span;
    long window;
    Scratch& scratch;

    static constexpr long size = kind == CACHE_FLOAT32 ? 4 : kind == CACHE_BFLOAT16 ? 2 : 1;
    long steps() const { return (heads.dim + T::pair - 1) / T::pair; }       // cells of a head
    long padded() const { return round_up(steps(), LANES); }
    long vectors() const { return (heads.dim + LANES - 1) / LANES; }
    long width() const { return vectors() * LANES; }
    static constexpr long value_steps = TILE / T::pair;

    void pack_query(const float* query, long ld, const Item& item, long head, long row) {
        float factor = heads.factor * LOG2_E;
        const long group = heads.group();
        for (long token = item.first; token < item.last; token++)
            for (long g = 0; g < group; g++, row++) {
                const float* from = query + (span.row + token) * ld + (head * group + g) * heads.dim;
                uint32_t* to = scratch.query + row * padded();
                for (long i = 0; i < heads.dim; i += LANES * T::pair) {
                    Floats low = load_part(from + i, heads.dim - i) * factor;
#if defined(GRISTMILL_BF16)
                    if (T::pair == 2) {
                        Floats high{};
                        if (i + LANES < heads.dim) high = load_part(from + i + LANES, heads.dim - i - LANES) * factor;
                        store(to + i / 2, pairs_of(low, high));
                        continue;
                    }
#endif
                    store(to + i, low);
                }
            }
    }

    // Keys [first, first + count) of one head; the places after them in the last 16 are zero.
    void pack_tile(long first, long count, long head) {
        const long stride = heads.kv_heads * heads.dim * size, offset = head * heads.dim * size;
        for (long key = 0; key < count; key += LANES) {
            long real = std::min<long>(LANES, count - key);
            const int32_t* slots = span.slots + first + key;
            for (long i = 0; i < steps(); i += LANES) {
                Words block[LANES];
                for (long lane = 0; lane < LANES; lane++)
                    block[lane] = lane < real ? cells<T, kind>(cache.keys + slots[lane] * stride + offset, i * T::pair,
                                                               heads.dim)
                                              : Words{};
                transpose(block);
                uint32_t* to = scratch.keys + (key / LANES * padded() + i) * LANES;
                for (long step = 0; step < LANES; step++) store(to + step * LANES, block[step]);
            }
            pack_values(slots, key, real, stride, offset);
            if (kind == CACHE_INT8)
                for (long lane = 0; lane < LANES; lane++) {
                    long at = lane < real ? slots[lane] * heads.kv_heads + head : 0;
                    scratch.key_scales[key + lane] = lane < real ? cache.key_scales[at] : 0.0f;
                    scratch.value_scales[key + lane] = lane < real ? cache.value_scales[at] : 0.0f;
                }
        }
    }

    void pack_values(const int32_t* slots, long key, long real, long stride, long offset) {
        for (long lane = 0; lane < LANES; lane += T::pair)
            for (long i = 0; i < heads.dim; i += LANES * T::pair) {
                Words row = {}, next = {};
                if (lane < real) row = cells<T, kind>(cache.values + slots[lane] * stride + offset, i, heads.dim);
                uint32_t* to = scratch.values + (i / LANES * value_steps + (key + lane) / T::pair) * LANES;
#if defined(GRISTMILL_BF16)
                if (T::pair == 2) {
                    if (lane + 1 < real)
                        next = cells<T, kind>(cache.values + slots[lane + 1] * stride + offset, i, heads.dim);
                    __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                                   38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
                    __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
                    store(to, (Words)_mm512_permutex2var_epi16((__m512i)row, low, (__m512i)next));
                    row = (Words)_mm512_permutex2var_epi16((__m512i)row, high, (__m512i)next);
                    if (i + LANES < heads.dim) store(to + value_steps * LANES, row);
                    continue;
                }
#endif
                (void)next;
                store(to, row);
            }
    }

    // The scores of one row, `vectors` of them, become weights relative to the tile's maximum.
    template <int vectors>
    void soften(const float* scores, uint32_t* weights, float& top, float& sum) {
        Floats x[vectors], highest = splat(LOWEST), total{};
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            x[v] = load<Floats>(scores + v * LANES);
            if (kind == CACHE_INT8) {  // a place behind the last key has the scale 0, which must not meet its -inf
                Floats scaled = x[v] * load<Floats>(scratch.key_scales + v * LANES);
                x[v] = x[v] == -INFINITY ? x[v] : scaled;
            }
            highest = largest(highest, x[v]);
        }
        top = largest_of(highest);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            x[v] = exp2_of<T::coarse>(x[v] - top);
            total += x[v];
            if (kind == CACHE_INT8) x[v] *= load<Floats>(scratch.value_scales + v * LANES);
        }
        sum = sum_of(total);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v += T::pair) {
#if defined(GRISTMILL_BF16)
            if (T::pair == 2) {
                store(weights + v * LANES / 2, pairs_of(x[v], v + 1 < vectors ? x[v + 1 < vectors ? v + 1 : v] : Floats{}));
                continue;
            }
#endif
            store(weights + v * LANES, x[v]);
        }
    }

    template <int most = TILE / LANES>
    void soften_of(int vectors, const float* scores, uint32_t* weights, float& top, float& sum) {
        if constexpr (most > 0) {
            if (vectors == most) return soften<most>(scores, weights, top, sum);
            soften_of<most - 1>(vectors, scores, weights, top, sum);
        }
    }

    // Rows [row, row + rows) of the item over the packed tile of `count` keys from `first`; merged into what the rows
    // have so far.
    void attend_rows(const Item& item, long base, long row, long rows, long first, long count) {
        const long group = heads.group(), stride = padded(), wide = width();
        const long position = span.start + item.first + row / group;
        const long last = span.start + item.first + (row + rows - 1) / group;
        const long needed = std::min(count, last + 1 - first);
        if (needed <= 0 || (window && position - window >= first + count - 1)) return;
        const int vectors = (needed + LANES - 1) / LANES;
        product<T>(rows, scratch.query + (base + row) * stride, stride, scratch.keys, stride * LANES, steps(), scratch.scores,
                   TILE, vectors);
        float tops[LANES], sums[LANES] = {};
        std::fill(tops, tops + LANES, LOWEST);
        long at = position, turn = row % group;
        row += base;
        for (long r = 0; r < rows; r++) {
            float* scores = scratch.scores + r * TILE;
            const long from = window ? at - window + 1 - first : 0, seen = std::min(needed, at + 1 - first);
            if (from > 0) std::fill(scores, scores + std::min<long>(from, vectors * LANES), -INFINITY);
            if (seen < vectors * LANES) std::fill(scores + std::max(seen, 0l), scores + vectors * LANES, -INFINITY);
            soften_of(vectors, scores, scratch.weights + r * TILE, tops[r], sums[r]);
            if (++turn == group) turn = 0, at++;
        }
        product<T>(rows, scratch.weights, TILE, scratch.values, value_steps * LANES,
                   (vectors * LANES + T::pair - 1) / T::pair, scratch.part, wide, this->vectors());
        Floats before = load_part(scratch.top + row, rows), tile = load<Floats>(tops), top = largest(tile, before);
        before = exp2_of(before - top), tile = exp2_of(tile - top);
        store_part(scratch.top + row, top, rows);
        store_part(scratch.sum + row, fused(load<Floats>(sums), tile, load_part(scratch.sum + row, rows) * before), rows);
        float befores[LANES], tiles[LANES];
        store(befores, before), store(tiles, tile);
        float *out = scratch.out + row * wide, *part = scratch.part;
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < wide; i += LANES, out += LANES, part += LANES)
                store(out, fused(load<Floats>(part), splat(tiles[r]), load<Floats>(out) * befores[r]));
    }

    void clear(long rows) {
        std::fill(scratch.out, scratch.out + rows * width(), 0.0f);
        std::fill(scratch.top, scratch.top + rows, LOWEST);
        std::fill(scratch.sum, scratch.sum + rows, 0.0f);
    }

    void keep_part(const Item& item, long base, long head, long tile, float* parts) {
        const long group = heads.group();
        for (long row = 0; row < (item.last - item.first) * group; row++) {
            float* part = parts + part_at(heads, span, tile, item.first + row / group, head * group + row % group);
            std::memcpy(part, scratch.out + (base + row) * width(), width() * sizeof(float));
            part[width()] = scratch.top[base + row], part[width() + 1] = scratch.sum[base + row];
        }
    }

    void finish(const Item& item, long base, long head, float* attended, long ld) {
        const long group = heads.group();
        for (long row = 0; row < (item.last - item.first) * group; row++) {
            float* to = attended + (span.row + item.first + row / group) * ld + (head * group + row % group) * heads.dim;
            const float share = 1.0f / scratch.sum[base + row];
            for (long i = 0; i < heads.dim; i += LANES)
                store_part(to + i, load<Floats>(scratch.out + (base + row) * width() + i) * share, heads.dim - i);
        }
    }

    // Rows of an item's heads lie one head after the other.
    void run(const Item& item, const float* query, long ldq, float* attended, long ldo, float* parts) {
        const long rows = (item.last - item.first) * heads.group(), end = span.start + item.last;
        const TileRange tiles(span, item, window);
        for (long head = item.head; head < item.head_end; head++)
            pack_query(query, ldq, item, head, (head - item.head) * rows);
        clear(rows * (item.head_end - item.head));
        for (long tile = tiles.begin; tile < tiles.end; tile++) {
            const long first = tile * TILE, count = std::min<long>(TILE, end - first);
            if (rows <= SMALL) touch_tile(heads, cache, span, tile, item.head, item.head_end);
            for (long head = item.head; head < item.head_end; head++) {
                const long base = (head - item.head) * rows;
                pack_tile(first, count, head);
                for (long row = 0; row < rows; row += ROWS)
                    attend_rows(item, base, row, std::min<long>(ROWS, rows - row), first, count);
                if (span.parts >= 0) keep_part(item, base, head, tile, parts);
            }
            if (span.parts >= 0) clear(rows * (item.head_end - item.head));
        }
        for (long head = item.head; head < item.head_end && span.parts < 0; head++)
            finish(item, (head - item.head) * rows, head, attended, ldo);
    }
};

// Attend one item: query rows (tokens, ldq) and attended rows (tokens, ldo) of the flat batch.
inline void attend(const Heads& heads, const Cache& cache, const Span& span, long window, Scratch& scratch,
                   const Item& item, const float* query, long ldq, float* attended, long ldo, float* parts) {
#if defined(GRISTMILL_BF16)
    using Narrow = PairTile;
#else
    using Narrow = FloatTile;
#endif
    const auto run = [&](auto attention) { attention.run(item, query, ldq, attended, ldo, parts); };
    if (cache.kind == CACHE_FLOAT32) run(Attention<FloatTile, CACHE_FLOAT32>{heads, cache, span, window, scratch});
    if (cache.kind == CACHE_BFLOAT16) run(Attention<Narrow, CACHE_BFLOAT16>{heads, cache, span, window, scratch});
    if (cache.kind == CACHE_INT8) run(Attention<Narrow, CACHE_INT8>{heads, cache, span, window, scratch});
}

// Merge what the tiles gave a token of a span with parts, in the order in which one item would have.
inline void merge_parts(const Heads& heads, const Span& span, long window, long token, const float* parts,
                        float* attended) {
    const long position = span.start + token, width = round_up(heads.dim, LANES);
    const long from = window ? std::max(0l, position - window + 1) / TILE : 0, to = position / TILE + 1;
    for (long head = 0; head < heads.heads; head++) {
        Floats out[MOST_DIM / LANES] = {}, top = splat(LOWEST), sum{};
        for (long tile = from; tile < to; tile++) {
            const float* part = parts + part_at(heads, span, tile, token, head);
            Floats tile_top = splat(part[width]), highest = largest(tile_top, top);
            Floats before = exp2_of(top - highest), share = exp2_of(tile_top - highest);
            top = highest, sum = fused(splat(part[width + 1]), share, sum * before);
            for (long i = 0; i < width; i += LANES)
                out[i / LANES] = fused(load<Floats>(part + i), share, out[i / LANES] * before);
        }
        Floats share = splat(1.0f / sum[0]);
        for (long i = 0; i < heads.dim; i += LANES)
            store_part(attended + head * heads.dim + i, out[i / LANES] * share, heads.dim - i);
    }
}

// Cut a step into items, the largest first, and give the spans that several items share room for their parts.
// Returns the floats that all parts take.
inline long plan_items(const Heads& heads, std::vector<Span>& spans, int threads, std::vector<Item>& items) {
    const long group = heads.group();
    long units = 0, parts = 0;
    for (Span& span : spans)
        if (span.length * group <= SMALL) units += span.tiles() * heads.kv_heads;
    const long target = std::max(1l, units / (4 * threads));
    items.clear();
    for (long s = 0; s < (long)spans.size(); s++) {
        Span& span = spans[s];
        span.parts = -1;
        const long tiles = span.tiles();
        if (span.length * group > SMALL) {
            const long block = std::max(1l, BLOCK_ROWS / group);
            for (long first = 0; first < span.length; first += block)
                for (long head = 0; head < heads.kv_heads; head++)
                    items.push_back({s, first, std::min(first + block, span.length), head, head + 1, 0, tiles});
            continue;
        }
        const long most = std::max(1l, BLOCK_ROWS / (span.length * group));  // heads whose rows fit the buffers
        // all heads together where that leaves enough items: they lie side by side in memory
        const bool all = most >= heads.kv_heads && (target >= heads.kv_heads || units >= 2 * threads * heads.kv_heads);
        const long step = all ? std::clamp(target / heads.kv_heads, 1l, tiles) : 1;
        const long at_once = all ? heads.kv_heads : std::min(most, target);
        if (step < tiles) {
            span.parts = parts;
            parts += tiles * span.length * heads.heads * part_size(heads);
        }
        for (long tile = 0; tile < tiles; tile += step)
            for (long head = 0; head < heads.kv_heads; head += at_once)
                items.push_back({s, 0, span.length, head, std::min(head + at_once, heads.kv_heads), tile,
                                 std::min(tile + step, tiles)});
    }
    auto cost = [&](const Item& item) {
        long seen = std::min(item.tile_end, (spans[item.span].start + item.last + TILE - 1) / TILE) - item.tile;
        return seen * (item.head_end - item.head) * (8 + (item.last - item.first) * group);
    };
    std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
    return parts;
}

}  // namespace gristmill
