// Table reads and row updates on the CPU, compiled by compile_cpp.py and called by cpu_rows.py; plain_rows.py is the reference.
//
// All matrices are row-major and contiguous. Rows are random accesses of some KB, so each loop prefetches the next rows while it works on
// the current ones: without that it waits for memory most of the time.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANE = 16;  // floats in a cache line

struct half_t { uint16_t bits; };
struct bfloat_t { uint16_t bits; };

inline float from_bits(uint32_t x) { float f; std::memcpy(&f, &x, 4); return f; }
inline uint32_t to_bits(float f) { uint32_t x; std::memcpy(&x, &f, 4); return x; }

// 16 values as floats; fp32 values are used in place.
inline const float* widen(const float* p, float*) { return p; }
inline const float* widen(const bfloat_t* p, float* out) {
#pragma omp simd
    for (int k = 0; k < LANE; ++k) out[k] = from_bits(uint32_t(p[k].bits) << 16);
    return out;
}
inline const float* widen(const half_t* p, float* out) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    for (int k = 0; k < LANE; k += 8) _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k))));
#else
    for (int k = 0; k < LANE; ++k) { _Float16 h; std::memcpy(&h, p + k, 2); out[k] = float(h); }
#endif
    return out;
}

// 16 floats to the nearest value, ties to even.
inline void narrow(float* p, const float* x) { std::memcpy(p, x, 4 * LANE); }
inline void narrow(bfloat_t* p, const float* x) {
#pragma omp simd
    for (int k = 0; k < LANE; ++k) {
        uint32_t bits = to_bits(x[k]);
        p[k].bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
inline void narrow(half_t* p, const float* x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(_mm512_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (int k = 0; k < LANE; k += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(p + k), _mm256_cvtps_ph(_mm256_loadu_ps(x + k), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int k = 0; k < LANE; ++k) { _Float16 h = _Float16(x[k]); std::memcpy(p + k, &h, 2); }
#endif
}

template <class T> constexpr int32_t mantissa() { return sizeof(T) == 4 ? 23 : 7; }
template <> constexpr int32_t mantissa<half_t>() { return 10; }
template <class T> constexpr uint32_t smallest_exponent() { return uint32_t(127 - 112) << 23; }
template <> constexpr uint32_t smallest_exponent<half_t>() { return uint32_t(127 - 14) << 23; }
template <class T> constexpr float largest() { return 0x1.fep127f; }
template <> constexpr float largest<half_t>() { return 65504; }

// The counter-based bits of models/random.py.
inline uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}
inline uint64_t row_key(uint64_t key, uint64_t row) {
    uint64_t x = (row ^ key) + 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

// Calls body(column, count) for runs of 16 columns, and once for what is left.
template <class Body> inline void by_lanes(int64_t dim, Body body) {
    int64_t c = 0;
    for (; c + LANE <= dim; c += LANE) body(c, LANE);
    if (c < dim) body(c, dim - c);
}

// Loads 16 values, or fewer into a zeroed buffer.
template <class T> inline const float* load(const T* p, int64_t count, float* buffer) {
    if (count == LANE) return widen(p, buffer);
    T part[LANE];
    std::memset(part, 0, sizeof part);
    std::memcpy(part, p, count * sizeof(T));
    const float* wide = widen(part, buffer);
    if (wide != buffer) std::memcpy(buffer, wide, 4 * LANE);
    return buffer;
}

inline void ask(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void ask_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// out += sum of weights[j] * values[rows[j]] for j in [first, last), four rows at a time.
template <class T, class Index>
void add_rows(const T* values, int64_t dim, const Index* rows, const float* weights, int64_t first, int64_t last, int64_t end, float* out) {
    int64_t j = first;
    for (; j + 4 <= last; j += 4) {
        const T* r[4];
        const T* next[4];
        for (int k = 0; k < 4; ++k) {
            r[k] = values + int64_t(rows[j + k]) * dim;
            int64_t ahead = j + 4 + k;
            next[k] = values + int64_t(rows[ahead < end ? ahead : j + k]) * dim;
        }
        const float w0 = weights[j], w1 = weights[j + 1], w2 = weights[j + 2], w3 = weights[j + 3];
        by_lanes(dim, [&](int64_t c, int64_t count) {
            float b0[LANE], b1[LANE], b2[LANE], b3[LANE];
            for (int k = 0; k < 4; ++k) ask(next[k] + c);
            const float *x0 = load(r[0] + c, count, b0), *x1 = load(r[1] + c, count, b1);
            const float *x2 = load(r[2] + c, count, b2), *x3 = load(r[3] + c, count, b3);
            if (count == LANE) {
#pragma omp simd
                for (int k = 0; k < LANE; ++k) out[c + k] += (w0 * x0[k] + w1 * x1[k]) + (w2 * x2[k] + w3 * x3[k]);
            } else {
                for (int k = 0; k < count; ++k) out[c + k] += (w0 * x0[k] + w1 * x1[k]) + (w2 * x2[k] + w3 * x3[k]);
            }
        });
    }
    for (; j < last; ++j) {
        const T* r = values + int64_t(rows[j]) * dim;
        const float w = weights[j];
        by_lanes(dim, [&](int64_t c, int64_t count) {
            float b[LANE];
            const float* x = load(r + c, count, b);
            if (count == LANE) {
#pragma omp simd
                for (int k = 0; k < LANE; ++k) out[c + k] += w * x[k];
            } else {
                for (int k = 0; k < count; ++k) out[c + k] += w * x[k];
            }
        });
    }
}

template <class T, class Index>
void gather_sum(const T* values, int64_t dim, const Index* rows, const float* weights, const int64_t* offsets, int64_t bags, int64_t reads,
                float* out, int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t bag = 0; bag < bags; ++bag) {
        float* sum = out + bag * dim;
        std::memset(sum, 0, dim * 4);
        add_rows(values, dim, rows, weights, offsets[bag], bag + 1 < bags ? offsets[bag + 1] : reads, reads, sum);
    }
}

template <class T, class Index>
void score_gradients(const T* values, int64_t dim, const Index* rows, const int64_t* offsets, int64_t bags, int64_t reads,
                     const float* upstream, float* out, int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t bag = 0; bag < bags; ++bag) {
        const float* u = upstream + bag * dim;
        const int64_t last = bag + 1 < bags ? offsets[bag + 1] : reads;
        for (int64_t j = offsets[bag]; j < last; j += 4) {
            // Past the end we read the last row again; its product is not stored.
            const T* r[4];
            const T* next[4];
            for (int k = 0; k < 4; ++k) {
                r[k] = values + int64_t(rows[j + k < last ? j + k : last - 1]) * dim;
                next[k] = values + int64_t(rows[j + 4 + k < reads ? j + 4 + k : last - 1]) * dim;
            }
            float s0[LANE] = {}, s1[LANE] = {}, s2[LANE] = {}, s3[LANE] = {};
            by_lanes(dim, [&](int64_t c, int64_t count) {
                float b0[LANE], b1[LANE], b2[LANE], b3[LANE], bu[LANE];
                for (int k = 0; k < 4; ++k) ask(next[k] + c);
                const float *x0 = load(r[0] + c, count, b0), *x1 = load(r[1] + c, count, b1);
                const float *x2 = load(r[2] + c, count, b2), *x3 = load(r[3] + c, count, b3), *y = load(u + c, count, bu);
#pragma omp simd
                for (int k = 0; k < LANE; ++k) {
                    s0[k] += x0[k] * y[k];
                    s1[k] += x1[k] * y[k];
                    s2[k] += x2[k] * y[k];
                    s3[k] += x3[k] * y[k];
                }
            });
            float total[4] = {};
            for (int k = 0; k < LANE; ++k) { total[0] += s0[k]; total[1] += s1[k]; total[2] += s2[k]; total[3] += s3[k]; }
            for (int k = 0; k < 4 && j + k < last; ++k) out[j + k] = total[k];
        }
    }
}

}  // namespace

extern "C" {

// dtype: 0 fp32, 1 fp16, 2 bf16. Returns 1 if a row is not in the table.
int memshard_gather_sum(const void* values, int dtype, int64_t slots, int64_t dim, const int32_t* rows, const float* weights,
                        const int64_t* offsets, int64_t bags, int64_t reads, float* out, int threads) {
    uint32_t highest = 0;
    for (int64_t j = 0; j < reads; ++j) highest = uint32_t(rows[j]) > highest ? uint32_t(rows[j]) : highest;
    if (reads && highest >= uint64_t(slots)) return 1;
    if (dtype == 0) gather_sum(static_cast<const float*>(values), dim, rows, weights, offsets, bags, reads, out, threads);
    if (dtype == 1) gather_sum(static_cast<const half_t*>(values), dim, rows, weights, offsets, bags, reads, out, threads);
    if (dtype == 2) gather_sum(static_cast<const bfloat_t*>(values), dim, rows, weights, offsets, bags, reads, out, threads);
    return 0;
}

void memshard_score_gradients(const void* values, int dtype, int64_t dim, const int32_t* rows, const int64_t* offsets, int64_t bags,
                              int64_t reads, const float* upstream, float* out, int threads) {
    if (dtype == 0) score_gradients(static_cast<const float*>(values), dim, rows, offsets, bags, reads, upstream, out, threads);
    if (dtype == 1) score_gradients(static_cast<const half_t*>(values), dim, rows, offsets, bags, reads, upstream, out, threads);
    if (dtype == 2) score_gradients(static_cast<const bfloat_t*>(values), dim, rows, offsets, bags, reads, upstream, out, threads);
}

// Stable radix sort of reads by row. order: [reads]; distinct: [reads]; starts: [reads + 1]. Returns the number of distinct rows.
int64_t memshard_sort_reads(const int32_t* rows, int64_t reads, int64_t slots, int32_t* order, int64_t* distinct, int64_t* starts) {
    constexpr int BITS = 11;
    struct Pair { uint32_t row, index; };
    std::vector<Pair> from(reads), to(reads);
    for (int64_t j = 0; j < reads; ++j) from[j] = {uint32_t(rows[j]), uint32_t(j)};
    for (int shift = 0; shift < 32 && uint64_t(slots - 1) >> shift; shift += BITS) {
        std::vector<int64_t> places((1 << BITS) + 1, 0);
        for (const Pair& pair : from) ++places[(pair.row >> shift & ((1 << BITS) - 1)) + 1];
        for (int k = 0; k < 1 << BITS; ++k) places[k + 1] += places[k];
        for (const Pair& pair : from) to[places[pair.row >> shift & ((1 << BITS) - 1)]++] = pair;
        from.swap(to);
    }
    int64_t count = 0;
    for (int64_t j = 0; j < reads; ++j) {
        order[j] = int32_t(from[j].index);
        if (j == 0 || from[j].row != from[j - 1].row) {
            distinct[count] = from[j].row;
            starts[count++] = j;
        }
    }
    starts[count] = reads;
    return count;
}

struct Update {
    void* values;
    float *exp_avg, *exp_avg_sq, *master;  // master: null where there is none
    const int64_t *rows, *starts;
    const int32_t* bags;
    const float *weights, *upstream;
    const float *step_sizes, *decay1, *decay2;  // by row; null: the common step size, no decay
    int64_t count, dim, first_row, first_column, key;
    float beta1, beta2, eps, step_size;
    int32_t dtype, threads;
};

}  // extern "C"

namespace {

template <class T> void adam_rows(const Update& u) {
    T* const values = static_cast<T*>(u.values);
    const int64_t dim = u.dim;
    const int64_t reads = u.starts[u.count];
    const float rest1 = 1 - u.beta1, rest2 = 1 - u.beta2;
#pragma omp parallel num_threads(u.threads)
    {
        std::vector<float> sum(dim);
        float* const g = sum.data();
#pragma omp for schedule(dynamic, 32)
        for (int64_t i = 0; i < u.count; ++i) {
            const int64_t row = u.rows[i], next = u.rows[i + 1 < u.count ? i + 1 : i];
            std::memset(g, 0, dim * 4);
            add_rows(u.upstream, dim, u.bags, u.weights, u.starts[i], u.starts[i + 1], reads, g);
            float* const m = u.exp_avg + row * dim;
            float* const v = u.exp_avg_sq + row * dim;
            float* const master = u.master ? u.master + row * dim : nullptr;
            T* const w = values + row * dim;
            const float size = u.step_sizes ? u.step_sizes[i] : u.step_size;
            const float decay1 = u.decay1 ? u.decay1[i] : 1, decay2 = u.decay2 ? u.decay2[i] : 1;
            const uint64_t key = row_key(uint64_t(u.key), uint64_t(row + u.first_row));
            by_lanes(dim, [&](int64_t c, int64_t count) {
                ask_to_write(u.exp_avg + next * dim + c);
                ask_to_write(u.exp_avg_sq + next * dim + c);
                ask_to_write(values + next * dim + c);
                if (u.master) ask_to_write(u.master + next * dim + c);
                float bm[LANE], bv[LANE], bw[LANE], bg[LANE], nm[LANE], nv[LANE], nw[LANE];
                const float *om = load(m + c, count, bm), *ov = load(v + c, count, bv), *gg = load(g + c, count, bg);
                const float* ow = master ? load(master + c, count, bw) : load(w + c, count, bw);
#pragma omp simd
                for (int k = 0; k < LANE; ++k) {
                    const float a = om[k] * decay1;
                    nm[k] = a + rest1 * (gg[k] - a);
                    nv[k] = ov[k] * decay2 * u.beta2 + rest2 * gg[k] * gg[k];
                    nw[k] = ow[k] - nm[k] / (std::sqrt(nv[k]) + u.eps) * size;
                }
                std::memcpy(m + c, nm, count * 4);
                std::memcpy(v + c, nv, count * 4);
                if (master) std::memcpy(master + c, nw, count * 4);
                if (sizeof(T) == 2 && !master) {
#pragma omp simd
                    for (int k = 0; k < LANE; ++k) {
                        uint32_t exponent = to_bits(nw[k]) & 0x7F800000u;
                        exponent = exponent < smallest_exponent<T>() ? smallest_exponent<T>() : exponent;
                        const uint32_t quantum = exponent - (uint32_t(mantissa<T>()) << 23);
                        const uint32_t bits = mix(mix(uint32_t(u.first_column + c + k) ^ uint32_t(key)) ^ uint32_t(key >> 32));
                        const float uniform = (float(int32_t(bits >> 9)) + 0.5f) * 0x1p-23f;
                        const float size = std::fabs(nw[k]), step = from_bits(quantum);
                        const float scaled = size * from_bits((254u << 23) - quantum), whole = std::floor(scaled);
                        const float rounded = (whole + (uniform < scaled - whole ? 1.0f : 0.0f)) * step;
                        const bool beyond = rounded > largest<T>() && size < largest<T>() + step / 2;
                        nw[k] = std::copysign(beyond ? largest<T>() : rounded, nw[k]);
                    }
                }
                T narrowed[LANE];
                narrow(narrowed, nw);
                std::memcpy(w + c, narrowed, count * sizeof(T));
            });
        }
    }
}

}  // namespace

extern "C" void memshard_adam_rows(const Update* update) {
    if (update->dtype == 0) adam_rows<float>(*update);
    if (update->dtype == 1) adam_rows<half_t>(*update);
    if (update->dtype == 2) adam_rows<bfloat_t>(*update);
}
