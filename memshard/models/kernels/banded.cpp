// Attention to predecessors in sorted groups on the CPU, forward and backward, called by cpu_banded.py; lsh/banded.py is the reference.
//
// In the order of a round a token's keys are in neighbouring places, so every inner loop is a weighted sum of neighbouring rows: of transposed
// keys for scores, of values for outputs. Sums run over keys from the oldest on, so later tokens change no bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANE = 16;
typedef float vec __attribute__((vector_size(4 * LANE)));
typedef float loose __attribute__((vector_size(4 * LANE), aligned(4)));

inline int64_t padded(int64_t n) { return (n + LANE - 1) / LANE * LANE; }

struct Banded {
    const float *q, *k, *v, *d_out;           // [rows x length, dim], v and d_out of width
    const int64_t* const* places;             // of each round, as in lsh/bucket_order.py
    const int32_t* const* groups;
    const int32_t* const* codes;
    float *out, *logs, *d_q, *d_k, *d_v;      // logs: [rows x length], binary logarithms of total weights
    int64_t rows, length, dim, width, rounds, window, chunk;
    int32_t itself, threads;
};

// out[0 .. 16 N) = sum of w[i] x[i stride + ...]
template <int N>
inline void weigh(const float* w, const float* x, int64_t stride, int64_t count, float* out) {
    vec sums[N];
    for (int n = 0; n < N; ++n) sums[n] = vec{};
    for (int64_t i = 0; i < count; ++i) {
        const float* row = x + i * stride;
        const float weight = w[i];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[n] += weight * *reinterpret_cast<const loose*>(row + n * LANE);
    }
    for (int n = 0; n < N; ++n) *reinterpret_cast<loose*>(out + n * LANE) = sums[n];
}

void weigh(const float* w, const float* x, int64_t stride, int64_t count, float* out, int64_t wide) {
    for (int64_t first = 0; first < wide; first += 8 * LANE) {
        const float* from = x + first;
        float* to = out + first;
        switch (std::min<int64_t>(8, (wide - first) / LANE)) {
            case 8: weigh<8>(w, from, stride, count, to); break;
            case 7: weigh<7>(w, from, stride, count, to); break;
            case 6: weigh<6>(w, from, stride, count, to); break;
            case 5: weigh<5>(w, from, stride, count, to); break;
            case 4: weigh<4>(w, from, stride, count, to); break;
            case 3: weigh<3>(w, from, stride, count, to); break;
            case 2: weigh<2>(w, from, stride, count, to); break;
            case 1: weigh<1>(w, from, stride, count, to); break;
        }
    }
}

// 2^x for x <= 0, to about 1e-7; 0 below 2^-126.
inline float power(float x) {
    const float low = x < -126.0f ? -126.0f : x;
    const float whole = std::floor(low + 0.5f), rest = low - whole;
    float y = 1.5252733e-5f;
    y = y * rest + 1.5403530e-4f;
    y = y * rest + 1.3333558e-3f;
    y = y * rest + 9.6181291e-3f;
    y = y * rest + 5.5504109e-2f;
    y = y * rest + 2.4022651e-1f;
    y = y * rest + 6.9314718e-1f;
    y = y * rest + 1.0f;
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return x < -126.0f ? 0.0f : y * scale;
}

// The data of a block of `chunk` places and the block before it, in order; transposed rows have a column for each of the 2 chunk places.
struct Blocks {
    const Banded& a;
    int64_t row, first, columns, dim, width;
    std::vector<float> keys, keys_t, values, values_t, scores;
    std::vector<int64_t> token;
    std::vector<int32_t> code, start;

    Blocks(const Banded& a, int64_t row)
        : a(a), row(row), first(row * a.length), columns(padded(2 * a.chunk) + padded(a.chunk)), dim(padded(a.dim)), width(padded(a.width)),
          keys(2 * a.chunk * dim), keys_t(a.dim * columns), values(2 * a.chunk * width), values_t(a.width * columns), scores(columns),
          token(2 * a.chunk), code(a.rounds * 2 * a.chunk), start(2 * a.chunk) {}

    // Move on to the block at `place` of a round; places count from the row's first.
    void load(int64_t round, int64_t place, bool backward) {
        const int64_t chunk = a.chunk, length = (a.length + chunk - 1) / chunk * chunk;
        const int64_t* places = a.places[round] + chunk + row * length;
        const int32_t* groups = a.groups[round] + chunk + row * length;
        if (place) {
            std::memcpy(keys.data(), keys.data() + chunk * dim, chunk * dim * 4);
            std::memcpy(values.data(), values.data() + chunk * width, chunk * width * 4);
            for (int64_t c = 0; c < a.dim; ++c) std::memcpy(&keys_t[c * columns], &keys_t[c * columns + chunk], chunk * 4);
            for (int64_t c = 0; backward && c < a.width; ++c) std::memcpy(&values_t[c * columns], &values_t[c * columns + chunk], chunk * 4);
            std::copy(token.begin() + chunk, token.end(), token.begin());
            for (int64_t r = 0; r < round; ++r) std::copy(&code[r * 2 * chunk + chunk], &code[r * 2 * chunk] + 2 * chunk, &code[r * 2 * chunk]);
            for (int64_t j = 0; j < chunk; ++j) start[j] = start[j + chunk] - int32_t(chunk);
        } else {
            std::fill(token.begin(), token.end(), -1);
        }
        for (int64_t j = chunk; j < 2 * chunk; ++j) {
            const int64_t p = place + j - chunk, t = p < a.length ? places[p] : -1;
            token[j] = t;
            if (t < 0) continue;
            start[j] = j > 0 && p > 0 && groups[p] == groups[p - 1] ? start[j - 1] : int32_t(j);
            std::memcpy(&keys[j * dim], a.k + t * a.dim, a.dim * 4);
            std::memcpy(&values[j * width], a.v + t * a.width, a.width * 4);
            for (int64_t c = 0; c < a.dim; ++c) keys_t[c * columns + j] = a.k[t * a.dim + c];
            for (int64_t c = 0; backward && c < a.width; ++c) values_t[c * columns + j] = a.v[t * a.width + c];
            for (int64_t r = 0; r < round; ++r) code[r * 2 * chunk + j] = a.codes[r][t];
        }
    }

    // The first place whose token the one at j sees, and how many it sees.
    int64_t seen(int64_t j, int64_t& count) const {
        const int64_t end = j + a.itself, begin = std::max<int64_t>(start[j], end - a.window);
        count = end - begin;
        return begin;
    }

    // Scores of the keys that the token at j sees, in powers of 2; very low for keys that an earlier round has counted.
    void score(int64_t round, int64_t j, int64_t begin, int64_t count, const float* query) {
        weigh(query, &keys_t[begin], columns, a.dim, scores.data(), padded(count));
        const int32_t near = a.itself ? 0 : 1, far = near + int32_t(a.window);
        for (int64_t r = 0; r < round; ++r) {
            const int32_t* codes = &code[r * 2 * a.chunk];
            const int32_t own = codes[j];
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                const int32_t apart = own - codes[begin + i];
                scores[i] = apart >= near && apart < far ? -1e38f : scores[i];
            }
        }
    }
};

constexpr float LOG2_E = 1.44269504f;
constexpr float LOWEST = -1e37f;

void forward_row(const Banded& a, int64_t row) {
    Blocks blocks(a, row);
    const int64_t width = blocks.width;
    std::vector<float> top(a.length, LOWEST), weight(a.length, 0.0f), query(a.dim), added(width);
    std::vector<float> total(a.length * width, 0.0f);
    for (int64_t round = 0; round < a.rounds; ++round)
        for (int64_t place = 0; place < a.length; place += a.chunk) {
            blocks.load(round, place, false);
            for (int64_t j = a.chunk; j < 2 * a.chunk && blocks.token[j] >= 0; ++j) {
                int64_t count;
                const int64_t begin = blocks.seen(j, count);
                if (!count) continue;
                const int64_t t = blocks.token[j], own = t - blocks.first;
                for (int64_t c = 0; c < a.dim; ++c) query[c] = a.q[t * a.dim + c] * LOG2_E;
                blocks.score(round, j, begin, count, query.data());
                float* scores = blocks.scores.data();
                float highest = top[own];
#pragma omp simd reduction(max : highest)
                for (int64_t i = 0; i < count; ++i) highest = std::max(highest, scores[i]);
                for (int64_t i = count; i < padded(count); ++i) scores[i] = -1e38f;
                vec sums = vec{};
                for (int64_t i = 0; i < padded(count); i += LANE) {
#pragma omp simd
                    for (int64_t l = 0; l < LANE; ++l) scores[i + l] = power(scores[i + l] - highest);
                    sums += *reinterpret_cast<loose*>(scores + i);
                }
                float sum = 0;
                for (int64_t l = 0; l < LANE; ++l) sum += sums[l];
                const float keep = power(top[own] - highest);
                weigh(scores, &blocks.values[begin * width], width, count, added.data(), width);
                float* mine = &total[own * width];
#pragma omp simd
                for (int64_t c = 0; c < width; ++c) mine[c] = mine[c] * keep + added[c];
                weight[own] = weight[own] * keep + sum;
                top[own] = highest;
            }
        }
    for (int64_t own = 0; own < a.length; ++own) {
        const int64_t t = blocks.first + own;
        const bool any = weight[own] > 0;
        a.logs[t] = any ? top[own] + std::log2(weight[own]) : INFINITY;
        for (int64_t c = 0; c < a.width; ++c) a.out[t * a.width + c] = any ? total[own * width + c] / weight[own] : a.v[t * a.width + c];
    }
}

void backward_row(const Banded& a, int64_t row) {
    Blocks blocks(a, row);
    const int64_t chunk = a.chunk, dim = blocks.dim, width = blocks.width;
    std::vector<float> queries(chunk * dim), upstream(chunk * width), means(a.length), d_query(dim), products(blocks.columns);
    // Columns are queries, rows the places of the two blocks.
    std::vector<float> weights(2 * chunk * chunk), d_scores(2 * chunk * chunk), gathered(std::max(dim, width));
    for (int64_t own = 0; own < a.length; ++own) {
        const float *d = a.d_out + (blocks.first + own) * a.width, *o = a.out + (blocks.first + own) * a.width;
        float mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < a.width; ++c) mean += d[c] * o[c];
        means[own] = mean;
        if (std::isinf(a.logs[blocks.first + own]))
            for (int64_t c = 0; c < a.width; ++c) a.d_v[(blocks.first + own) * a.width + c] += d[c];
    }
    for (int64_t round = 0; round < a.rounds; ++round)
        for (int64_t place = 0; place < a.length; place += chunk) {
            blocks.load(round, place, true);
            std::fill(weights.begin(), weights.end(), 0.0f);
            std::fill(d_scores.begin(), d_scores.end(), 0.0f);
            int64_t filled = 0;
            for (int64_t j = chunk; j < 2 * chunk && blocks.token[j] >= 0; ++j, ++filled) {
                const int64_t t = blocks.token[j], own = t - blocks.first, i = j - chunk;
                for (int64_t c = 0; c < a.dim; ++c) queries[i * dim + c] = a.q[t * a.dim + c] * LOG2_E;
                std::memcpy(&upstream[i * width], a.d_out + t * a.width, a.width * 4);
                int64_t count;
                const int64_t begin = blocks.seen(j, count);
                if (!count || std::isinf(a.logs[t])) continue;
                blocks.score(round, j, begin, count, &queries[i * dim]);
                float* scores = blocks.scores.data();
                weigh(&upstream[i * width], &blocks.values_t[begin], blocks.columns, a.width, products.data(), padded(count));
                const float log = a.logs[t], mean = means[own];
#pragma omp simd
                for (int64_t s = 0; s < count; ++s) {
                    const float weight = power(std::min(scores[s] - log, 0.0f));
                    scores[s] = weight;
                    products[s] = weight * (products[s] - mean);
                }
                weigh(products.data(), &blocks.keys[begin * dim], dim, count, d_query.data(), dim);
#pragma omp simd
                for (int64_t c = 0; c < a.dim; ++c) a.d_q[t * a.dim + c] += d_query[c];
                for (int64_t s = 0; s < count; ++s) {
                    weights[(begin + s) * chunk + i] = scores[s];
                    d_scores[(begin + s) * chunk + i] = products[s];
                }
            }
            for (int64_t j = 0; j < chunk + filled; ++j) {
                const int64_t t = blocks.token[j];
                if (t < 0) continue;
                // The queries that see the token at j.
                const int64_t from = std::max<int64_t>(0, j - chunk), count = std::min<int64_t>(filled, j + a.window - chunk + 1) - from;
                if (count <= 0) continue;
                weigh(&d_scores[j * chunk + from], &queries[from * dim], dim, count, gathered.data(), dim);
                for (int64_t c = 0; c < a.dim; ++c) a.d_k[t * a.dim + c] += gathered[c] / LOG2_E;
                weigh(&weights[j * chunk + from], &upstream[from * width], width, count, gathered.data(), width);
                for (int64_t c = 0; c < a.width; ++c) a.d_v[t * a.width + c] += gathered[c];
            }
        }
}

}  // namespace

extern "C" void memshard_banded_forward(const Banded* a) {
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
    for (int64_t row = 0; row < a->rows; ++row) forward_row(*a, row);
}

extern "C" void memshard_banded_backward(const Banded* a) {
#pragma omp parallel for num_threads(a->threads) schedule(dynamic)
    for (int64_t row = 0; row < a->rows; ++row) backward_row(*a, row);
}
