// A whole step of a decoder of the Llama family in one call, compiled twin of gristmill.model's pre-norm block.
//
// One parallel region runs all layers; its threads meet at barriers between the phases of a layer. Every phase splits
// its work so that a row's result does not depend on the split.
#include <omp.h>

#include "adapter.h"
#include "attention.h"
#include "linear.h"
#include "team.h"

namespace gristmill {
namespace {

constexpr long ROW_BLOCK = 48;

// What Python fills, once for a model. Weights, norms and the cache belong to Python.
struct Layer {
    Linear qkv, output, gate_up, down;
    const float *attention_norm, *mlp_norm;  // null: no norm
    const float *query_norm, *key_norm;      // (head_dim), null: none
    int32_t place, window, rotary, unused;   // place in the cache; window 0: none; rotary: which tables, -1 none
};

struct Decoder {
    int32_t hidden, heads, kv_heads, head_dim, inner, vocab, layer_count, activation;
    int32_t block_size, cache_kind, rotary_dim[2];
    float eps, factor, logit_scale, logit_softcap;  // softcap 0: none
    int64_t slots;
    const Layer* layers;
    const Linear* head;
    const float* final_norm;
    char *keys, *values;
    float *key_scales, *value_scales;
};

// What Python fills for a step. The row of a token in the tables is its position, or with rope_by_token its place.
struct Step {
    int64_t tokens, chunk_count;
    const int64_t *starts, *lengths, *tables, *table_ends;  // tables: block ids, those of chunk i end at table_ends[i]
    const float *cosines[2], *sines[2];
    int64_t rope_by_token;
    const AdapterLayer* const* adapters;  // the layers of each chunk's adapter, null for none; null when none has one
    int64_t low_size;                     // most ranks of a product together
    float *x, *hidden;  // (tokens, hidden): embedded tokens, which become the residual stream; final states
};

}  // namespace

class Stack {
    const Decoder decoder;
    const int threads;
    const Heads heads;
    const std::vector<Layer> layers;
    Barrier barrier;
    Buffer row_memory, projected_memory, attended_memory, inner_memory, part_memory, scratch_memory, logit_memory,
        wide_memory, low_memory;
    std::vector<int32_t> slots;      // of all positions of all spans
    std::vector<int32_t> span_of;    // token -> span
    std::vector<Span> spans;
    std::vector<Item> items;
    std::vector<std::atomic<long>> next_item;  // one counter for each layer
    float *projected, *attended, *inner, *parts, *wide, *low;
    char* row_buffer;
    uint32_t* scratch_words;
    size_t scratch_stride, rows_size, inner_size, wide_size, low_size;

    long qkv_size() const { return (heads.heads + 2 * heads.kv_heads) * heads.dim; }
    long query_size() const { return heads.heads * heads.dim; }

    // Rows that one thread, or all threads together, take through a stretch of a layer.
    struct Part {
        long begin, end;
        int thread, team;
        char* rows;    // memory of prepared rows
        float* inner;  // (end - begin, 2 * inner)
        float *wide, *low;  // for adapters: rows before they are prepared, and (end - begin, step.low_size)
        float* row;         // of this thread alone
        long count() const { return end - begin; }
        Share share() const { return {end - begin, thread, team}; }
    };

    // With many tokens each thread takes rows of its own through a layer, some at a time so that they stay in its
    // cache; with few, all threads share every product.
    bool by_rows(long tokens, int team) const { return tokens >= 16 * team && tokens >= 2 * team * ROW_BLOCK / 3; }

    void make_room(const Step& step) {
        const bool own = by_rows(step.tokens, threads);
        const long rows = own ? ROW_BLOCK : step.tokens;
        rows_size = 0;
        for (const Layer& layer : layers)
            for (const Linear* linear : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down})
                rows_size = std::max<size_t>(rows_size, round_up(rows_bytes(*linear, rows), 4096));
        inner_size = round_up(rows * 2 * decoder.inner, 1024);
        row_buffer = row_memory.of<char>(rows_size * (own ? threads : 1));
        inner = inner_memory.of<float>(inner_size * (own ? threads : 1) * sizeof(float));
        projected = projected_memory.of<float>(step.tokens * qkv_size() * sizeof(float));
        attended = attended_memory.of<float>(step.tokens * query_size() * sizeof(float));
        wide_size = step.adapters ? round_up(rows * std::max(decoder.hidden, decoder.inner), 1024) : 0;
        low_size = round_up(rows * step.low_size, 1024);
        wide = wide_memory.of<float>(wide_size * (own ? threads : 1) * sizeof(float));
        low = low_memory.of<float>(low_size * (own ? threads : 1) * sizeof(float));
        make_scratch(std::max<long>({decoder.hidden, decoder.inner, query_size()}));
    }

    void make_scratch(long widest) {
        scratch_stride = round_up(Scratch::words(heads) + widest, 1024);
        scratch_words = scratch_memory.of<uint32_t>(scratch_stride * threads * sizeof(uint32_t));
    }

    float* row_of(int thread) const { return (float*)(scratch_words + scratch_stride * thread) + Scratch::words(heads); }

    // The first chunk that its blocks do not hold, -1 for none.
    long unfit(const Step& step) const {
        const long size = decoder.block_size, blocks = decoder.slots / size;
        for (long i = 0, at = 0; i < step.chunk_count; at = step.table_ends[i++]) {
            if (step.starts[i] < 0 || step.lengths[i] < 1) return i;
            if ((step.table_ends[i] - at) * size < step.starts[i] + step.lengths[i]) return i;
            for (long j = at; j < step.table_ends[i]; j++)
                if (step.tables[j] < 0 || step.tables[j] >= blocks) return i;
        }
        return -1;
    }

    void plan(const Step& step) {
        spans.clear(), span_of.clear();
        size_t positions = 0;
        for (long i = 0; i < step.chunk_count; i++) positions += step.starts[i] + step.lengths[i];
        slots.resize(positions);
        int32_t* at = slots.data();
        long row = 0;
        for (long i = 0; i < step.chunk_count; i++) {
            const long end = step.starts[i] + step.lengths[i], size = decoder.block_size;
            spans.push_back({row, step.starts[i], step.lengths[i], at, -1});
            const int64_t* table = step.tables + (i ? step.table_ends[i - 1] : 0);
            for (long first = 0; first < end; first += size, table++)
                for (long p = first; p < std::min(first + size, end); p++) *at++ = (int32_t)(*table * size + p - first);
            span_of.insert(span_of.end(), step.lengths[i], (int32_t)i);
            row += step.lengths[i];
        }
        long floats = plan_items(heads, spans, threads, items);
        parts = part_memory.of<float>(floats * sizeof(float));
        for (auto& counter : next_item) counter.store(0, std::memory_order_relaxed);
    }

    Cache cache_of(const Layer& layer) const {
        const long size = decoder.cache_kind == CACHE_FLOAT32 ? 4 : decoder.cache_kind == CACHE_BFLOAT16 ? 2 : 1;
        const long entries = layer.place * decoder.slots * heads.kv_heads;
        return {decoder.cache_kind, decoder.keys + entries * heads.dim * size,
                decoder.values + entries * heads.dim * size, decoder.key_scales + entries,
                decoder.value_scales + entries};
    }

    // Head `index` of a token's projection: queries and keys are normed and turned, keys and values go to their slot.
    void place_head(const Step& step, const Layer& layer, const Cache& cache, long token, long index) {
        const Span& span = spans[span_of[token]];
        const long position = span.start + token - span.row;
        float* head = projected + token * qkv_size() + index * heads.dim;
        const bool is_query = index < heads.heads, is_value = index >= heads.heads + heads.kv_heads;
        if (!is_value) {
            const float* norm = is_query ? layer.query_norm : layer.key_norm;
            if (norm) rms_norm(head, norm, decoder.eps, head, heads.dim);
            if (layer.rotary >= 0) {
                const long dim = decoder.rotary_dim[layer.rotary], row = step.rope_by_token ? token : position;
                rotate(head, step.cosines[layer.rotary] + row * dim, step.sines[layer.rotary] + row * dim, dim);
            }
        }
        if (is_query) return;
        const long kv = index - heads.heads - (is_value ? heads.kv_heads : 0);
        const long entry = span.slots[position] * heads.kv_heads + kv;
        store_head(head, is_value ? cache.values : cache.keys, is_value ? cache.value_scales : cache.key_scales, entry);
    }

    void store_head(const float* head, char* store, float* scales, long entry) const {
        if (decoder.cache_kind == CACHE_FLOAT32) {
            std::memcpy(store + entry * heads.dim * 4, head, heads.dim * sizeof(float));
        } else if (decoder.cache_kind == CACHE_BFLOAT16) {
            uint16_t* to = (uint16_t*)store + entry * heads.dim;
            for (long i = 0; i < heads.dim; i += LANES) store_bfloat16(to + i, load_part(head + i, heads.dim - i), heads.dim - i);
        } else {
            int8_t* to = (int8_t*)store + entry * heads.dim;
            float most = 0.0f;
            bool finite = true;
            for (long i = 0; i < heads.dim; i++) most = std::max(most, std::fabs(head[i])), finite &= head[i] - head[i] == 0;
            const float scale = std::max(most / 127.0f, 1.17549435e-38f);
            for (long i = 0; i < heads.dim; i++) to[i] = finite ? (int8_t)std::nearbyint(head[i] / scale) : 0;
            scales[entry] = finite ? scale : NAN;
        }
    }

    // The next item of a layer, none after the last.
    const Item* claim(std::atomic<long>& next) {
        const long index = next.fetch_add(1, std::memory_order_relaxed);
        return index < (long)items.size() ? &items[index] : nullptr;
    }

    void attention(const Layer& layer, std::atomic<long>& next, int thread) {
        Scratch scratch(heads, scratch_words + scratch_stride * thread);
        const Cache cache = cache_of(layer);
        for (const Item* item; (item = claim(next));)
            attend(heads, cache, spans[item->span], layer.window, scratch, *item, projected, qkv_size(), attended,
                   query_size(), parts);
    }

    // Where row t of a part is made, of `width` values, before it is prepared for a product.
    float* row_at(const Step& step, const Part& part, long t, long width) const {
        return step.adapters ? part.wide + t * width : part.row;
    }

    // Calls work(the layer of an adapter, first row, rows) for the stretches of a part's rows that have one.
    template <class Work>
    void each_adapter(const Step& step, const Layer& layer, const Part& part, Work work) const {
        for (long t = 0, end; step.adapters && t < part.count(); t = end) {
            const AdapterLayer* own = step.adapters[span_of[part.begin + t]];
            for (end = t + 1; end < part.count() && step.adapters[span_of[part.begin + end]] == own;) end++;
            if (own) work(own[&layer - layers.data()], t, end - t);
        }
    }

    // y becomes (or grows by) the product of prepared rows, and what adapters make of these rows x as they were before.
    // Begins and ends with all threads of the part together.
    void apply(const Step& step, const Layer& layer, const Part& part, const Linear& linear, Product product,
               const Rows& rows, const float* x, float* y, bool accumulate) {
        barrier.wait(part.team);
        multiply(linear, rows, part.count(), y, linear.out, accumulate, part.thread, part.team);
        each_adapter(step, layer, part, [&](const AdapterLayer& own, long t, long count) {
            read_low(own, product, x + t * linear.in, count, linear.in, part.low + t * step.low_size, step.low_size,
                     part.thread, part.team);
        });
        barrier.wait(part.team);
        each_adapter(step, layer, part, [&](const AdapterLayer& own, long t, long count) {
            add_low(own, product, part.low + t * step.low_size, step.low_size, count, y + t * linear.out, linear.out,
                    part.thread, part.team);
        });
        if (step.adapters) barrier.wait(part.team);
    }

    // From the residual stream to queries in `projected`, and keys and values in the cache.
    void before_attention(const Step& step, const Layer& layer, const Part& part) {
        const long hidden = decoder.hidden, per_token = heads.heads + 2 * heads.kv_heads;
        const Rows rows = rows_at(layer.qkv, part.rows, part.count());
        const Share mine = part.share(), units(part.count() * per_token, part.thread, part.team);
        for (long t = mine.begin; t < mine.end; t++) {
            float* row = row_at(step, part, t, hidden);
            rms_norm(step.x + (part.begin + t) * hidden, layer.attention_norm, decoder.eps, row, hidden);
            prepare_row(rows, t, row);
        }
        apply(step, layer, part, layer.qkv, QKV, rows, part.wide, projected + part.begin * qkv_size(), false);
        const Cache cache = cache_of(layer);
        for (long unit = units.begin; unit < units.end; unit++)
            place_head(step, layer, cache, part.begin + unit / per_token, unit % per_token);
    }

    // From attended values back to the residual stream, and through the feed-forward layer.
    void after_attention(const Step& step, const Layer& layer, const Part& part) {
        const long hidden = decoder.hidden, count = part.count();
        const Share mine = part.share();
        float* x = step.x + part.begin * hidden;
        Rows rows = rows_at(layer.output, part.rows, count);
        for (long t = mine.begin; t < mine.end; t++) {
            const Span& span = spans[span_of[part.begin + t]];
            float* own = attended + (part.begin + t) * query_size();
            if (span.parts >= 0) merge_parts(heads, span, layer.window, part.begin + t - span.row, parts, own);
            prepare_row(rows, t, own);
        }
        apply(step, layer, part, layer.output, OUTPUT, rows, attended + part.begin * query_size(), x, true);
        rows = rows_at(layer.gate_up, part.rows, count);
        for (long t = mine.begin; t < mine.end; t++) {
            float* row = row_at(step, part, t, hidden);
            rms_norm(x + t * hidden, layer.mlp_norm, decoder.eps, row, hidden);
            prepare_row(rows, t, row);
        }
        apply(step, layer, part, layer.gate_up, GATE_UP, rows, part.wide, part.inner, false);
        rows = rows_at(layer.down, part.rows, count);
        for (long t = mine.begin; t < mine.end; t++) {
            const float* gate = part.inner + t * 2 * decoder.inner;
            float* row = row_at(step, part, t, decoder.inner);
            gated(decoder.activation, gate, gate + decoder.inner, row, decoder.inner);
            prepare_row(rows, t, row);
        }
        apply(step, layer, part, layer.down, DOWN, rows, part.wide, x, true);
    }

    void run_layers(const Step& step, int thread, int team) {
        const bool own = by_rows(step.tokens, threads);
        std::vector<Part> mine;
        if (own) {
            const Share rows(step.tokens, thread, team);
            const long blocks = (rows.end - rows.begin + ROW_BLOCK - 1) / ROW_BLOCK;
            for (long block = 0; block < blocks; block++) {
                const Share share(rows.end - rows.begin, block, blocks);
                mine.push_back({rows.begin + share.begin, rows.begin + share.end, 0, 1, row_buffer + rows_size * thread,
                                inner + inner_size * thread, wide + wide_size * thread, low + low_size * thread,
                                row_of(thread)});
            }
        } else {
            mine.push_back({0, step.tokens, thread, team, row_buffer, inner, wide, low, row_of(thread)});
        }
        for (const Part& part : mine) before_attention(step, layers[0], part);
        for (size_t i = 0; i < layers.size(); i++) {
            barrier.wait(team);
            attention(layers[i], next_item[i], thread);
            barrier.wait(team);
            for (const Part& part : mine) {
                after_attention(step, layers[i], part);
                if (i + 1 < layers.size()) before_attention(step, layers[i + 1], part);  // while its rows are at hand
            }
        }
        const Share rows(step.tokens, thread, team);
        for (long t = rows.begin; t < rows.end; t++)
            rms_norm(step.x + t * decoder.hidden, decoder.final_norm, decoder.eps, step.hidden + t * decoder.hidden,
                     decoder.hidden);
    }

    void head(const float* hidden, long rows, float* logits, int thread, int team) {
        Rows prepared = rows_at(*decoder.head, row_buffer, rows);
        float* row = row_of(thread);
        const Share mine(rows, thread, team);
        for (long r = mine.begin; r < mine.end; r++) {
            const float* from = hidden + r * decoder.hidden;
            if (decoder.logit_scale != 1.0f) {
                for (long i = 0; i < decoder.hidden; i++) row[i] = from[i] * decoder.logit_scale;
                from = row;
            }
            prepare_row(prepared, r, from);
        }
        barrier.wait(team);
        multiply(*decoder.head, prepared, rows, logits, decoder.vocab, false, thread, team);
        barrier.wait(team);
        if (decoder.logit_softcap == 0.0f) return;
        const Share values(rows * decoder.vocab, thread, team);
        for (long i = values.begin; i < values.end; i++)
            logits[i] = decoder.logit_softcap * std::tanh(logits[i] / decoder.logit_softcap);
        barrier.wait(team);
    }

    void make_head_room(long rows) {
        row_buffer = row_memory.of<char>(rows_bytes(*decoder.head, rows));
        make_scratch(decoder.hidden);
    }

  public:
    Stack(const Decoder& decoder, int threads)
        : decoder(decoder), threads(threads),
          heads{decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.factor},
          layers(decoder.layers, decoder.layers + decoder.layer_count), next_item(decoder.layer_count) {}

    // Returns the first chunk that its blocks do not hold, having done nothing; -1 when all is done.
    long run(const Step& step) {
        const long wrong = unfit(step);
        if (wrong >= 0) return wrong;
        make_room(step);
        plan(step);
#pragma omp parallel num_threads(threads)
        run_layers(step, omp_get_thread_num(), omp_get_num_threads());
        return -1;
    }

    void logits(const float* hidden, long rows, float* into) {
        make_head_room(rows);
#pragma omp parallel num_threads(threads)
        head(hidden, rows, into, omp_get_thread_num(), omp_get_num_threads());
    }

    void greedy(const float* hidden, long rows, int64_t* best, float* highest) {
        make_head_room(rows);
        float* into = logit_memory.of<float>(rows * decoder.vocab * sizeof(float));
#pragma omp parallel num_threads(threads)
        {
            const int thread = omp_get_thread_num(), team = omp_get_num_threads();
            head(hidden, rows, into, thread, team);
            argmax_rows(into, decoder.vocab, rows, decoder.vocab, best, highest, thread, team);
            const Share mine(rows, thread, team);
            for (long r = mine.begin; r < mine.end; r++)
                if (!std::isfinite(highest[r])) best[r] = -1;
        }
    }
};

}  // namespace gristmill

// What Python calls.
extern "C" {

void* gristmill_stack(const gristmill::Decoder* decoder, int threads) { return new gristmill::Stack(*decoder, threads); }

void gristmill_stack_free(gristmill::Stack* stack) { delete stack; }

long gristmill_stack_run(gristmill::Stack* stack, const gristmill::Step* step) { return stack->run(*step); }

void gristmill_stack_logits(gristmill::Stack* stack, const float* hidden, long rows, float* logits) {
    stack->logits(hidden, rows, logits);
}

void gristmill_stack_greedy(gristmill::Stack* stack, const float* hidden, long rows, int64_t* best, float* highest) {
    stack->greedy(hidden, rows, best, highest);
}

}
