// Product-key search on the CPU, called by cpu_topk.py; plain_topk.py is the reference.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANE = 16;

// An integer that is ordered as the score is; 0 and -0 are equal, NaN is above or below all others.
inline int32_t ordered(float score) {
    score += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &score, 4);
    return bits ^ (bits >> 31 & 0x7FFFFFFF);
}

struct Scratch {
    std::vector<int32_t> scores, tops;
    std::vector<uint64_t> kept;  // score, highest first, then index: unique, so any sort gives the same order
    void reserve(int64_t n, int64_t k) {
        scores.resize(n + LANE);
        tops.resize(2 * k + LANE);
        kept.resize(n + LANE);
    }
};

// Appends the scores of at least `lowest` in [first, last).
inline void collect(const int32_t* scores, int64_t first, int64_t last, int32_t lowest, uint64_t* kept, int64_t& count) {
    const auto add = [&](int64_t i) { kept[count++] = uint64_t(uint32_t(~scores[i]) ^ 0x80000000u) << 32 | uint64_t(i); };
    int64_t i = first;
#if defined(__AVX512F__)
    for (; i + LANE <= last; i += LANE) {
        uint32_t here = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(scores + i), _mm512_set1_epi32(lowest));
        for (; here; here &= here - 1) add(i + __builtin_ctz(here));
    }
#endif
    for (; i < last; ++i)
        if (scores[i] >= lowest) add(i);
}

// The indices of the k highest of n numbers, best first, equal ones by index.
void best(const float* numbers, int64_t n, int64_t k, Scratch& scratch, int32_t* indices) {
    int32_t* const scores = scratch.scores.data();
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scores[i] = ordered(numbers[i]);
    // Take the maxima of 2k groups or more: the k-th largest of them is at most the k-th largest of all, and few numbers are above it.
    int32_t lowest = INT32_MIN;
    const int64_t groups = (2 * k + LANE - 1) / LANE * LANE;
    if (n >= 2 * groups) {
        int32_t* const tops = scratch.tops.data();
        std::memcpy(tops, scores, groups * 4);
        for (int64_t i = groups; i + groups <= n; i += groups) {
#pragma omp simd
            for (int64_t g = 0; g < groups; ++g) tops[g] = tops[g] > scores[i + g] ? tops[g] : scores[i + g];
        }
        std::nth_element(tops, tops + k - 1, tops + groups, [](int32_t a, int32_t b) { return a > b; });
        lowest = tops[k - 1];
    }
    uint64_t* const kept = scratch.kept.data();
    int64_t count = 0;
    collect(scores, 0, n, lowest, kept, count);
    if (count > 2 * k) {
        std::nth_element(kept, kept + k, kept + count);
        count = k;
    }
    std::sort(kept, kept + count);
    for (int64_t j = 0; j < k; ++j) indices[j] = int32_t(uint32_t(kept[j]));
}

}  // namespace

// halves: two of [tokens, heads, keys] floats; strides: of their tokens and heads; x, y: [pairs] ranks that can win;
// i1, i2: [tokens, heads, k].
extern "C" void memshard_product_search(const float* const* halves, const int64_t* strides, int64_t tokens, int64_t heads, int64_t keys,
                                        int64_t k, const int64_t* x, const int64_t* y, int64_t pairs, int32_t* i1, int32_t* i2, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch;
        scratch.reserve(std::max(keys, pairs), k);
        std::vector<int32_t> order1(k), order2(k), chosen(k);
        std::vector<float> sums(pairs);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < tokens * heads; ++row) {
            const float* const a = halves[0] + row / heads * strides[0] + row % heads * strides[1];
            const float* const b = halves[1] + row / heads * strides[2] + row % heads * strides[3];
            best(a, keys, k, scratch, order1.data());
            best(b, keys, k, scratch, order2.data());
            for (int64_t p = 0; p < pairs; ++p) sums[p] = a[order1[x[p]]] + b[order2[y[p]]];
            best(sums.data(), pairs, k, scratch, chosen.data());
            for (int64_t j = 0; j < k; ++j) {
                i1[row * k + j] = order1[x[chosen[j]]];
                i2[row * k + j] = order2[y[chosen[j]]];
            }
        }
    }
}
