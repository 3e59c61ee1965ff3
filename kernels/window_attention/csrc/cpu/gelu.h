// GELU of rows of numbers, forward and backward, with bias, conversions and the sums for the bias
// in the same pass.
#pragma once
#include "../gelu.h"
#include "rows.h"

namespace wa {
namespace WA_ISA {

template <class T>
static inline vf take(const T* from) {
    if constexpr (__is_same(T, float)) return load(from);
#if defined(__AVX512F__)
    else if constexpr (__is_same(T, Half))
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    else if constexpr (__is_same(T, Half))
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#endif
    else if constexpr (__is_same(T, Bf16))
        return (vf)(__builtin_convertvector(*(const vh_any*)from, vi) << 16);
    else {
        vf x;
        for (int i = 0; i < W; ++i) x[i] = wide(from[i]);
        return x;
    }
}

template <class T>
static inline void give(vf x, T* to) {
    const float* const from = (const float*)&x;
    store_row(from, 1.0f, to, W);
}

static inline vf inverse(vf x) {  // for 1 <= x
#if defined(__AVX512F__)
    const vf guess = (vf)_mm512_rcp14_ps((__m512)x);
    return guess * (all(2.0f) - x * guess);
#else
    return all(1.0f) / x;
#endif
}

// Φ(x). With a = |x|, Φ(-a) = 2^(-a² / (2 ln 2)) R(a); R is a polynomial in 1 / (1 + 0.35 a) - 0.6,
// fitted by least squares scaleed until the largest error was least: 2e-10 of 1, and up to a = 9
// within 5e-6 of Φ(-a). density: that power of 2. From 11.75 on, where they are below 1e-30, both
// are 0.
static inline vf normal(vf x, vf& density) {
    const vf a = (vf)((vi)x & all_int(0x7fffffff));
    const vf u = inverse(all(1.0f) + all(0.35f) * a) - all(0.6f);
    const vf e = exp2v<true>(x * x * all(-0.5f * LOG2E));
    const vi near = a < all(11.75f);
    density = near ? e : vf{};
    vf r = (all(-0.0261255708f) * u + all(0.0527065619f)) * u + all(0.00989400558f);
    r = ((r * u + all(-0.117579229f)) * u + all(-0.0170283725f)) * u + all(0.33027626f);
    r = ((r * u + all(0.584112246f)) * u + all(0.531645479f)) * u + all(0.174276348f);
    const vf tail = near ? e * r : vf{};  // r is no number where x is infinite
    return x < vf{} ? tail : all(1.0f) - tail;
}

template <class Kept, class Act>
struct Gelu {
    // W numbers
    static void forward(const Act* before, vf bias, Kept* kept, Act* act) {
        const vf x = take(before);
        vf density;
        if (kept) give(x, kept);
        give((x + bias) * normal(x + bias, density), act);
    }

    static vf backward(const Kept* before, vf bias, Act* act, Act* grad) {
        const vf x = take(before) + bias;
        vf density;
        const vf phi = normal(x, density), slope = phi + x * density * all(0.398942280401f);
        give(x * phi, act);
        const vf g = take(grad) * slope;
        give(g, grad);
        return g;
    }

    // R rows of a block: the sums for the bias are added up for them first, which is more exact,
    // and reads them less often.
    template <int R>
    static void rows_back(const GeluArgs* a, int64_t row, float* sums) {
        const int64_t width = a->width, whole = width / W * W, at = row * width;
        const int rest = int(width - whole);
        const Kept* const before = (const Kept*)a->before + at;
        Act *const act = (Act*)a->act + at, *const grad = (Act*)a->grad + at;
        for (int64_t c = 0; c < whole; c += W) {
            const vf bias = a->bias ? load(a->bias + c) : vf{};
            vf total = {};
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const int64_t to = r * width + c;
                total += backward(before + to, bias, act + to, grad + to);
            }
            store(sums + c, load(sums + c) + total);
        }
        if (!rest) return;
        const vf bias = Padded<float>(a->bias ? a->bias + whole : nullptr, rest).vector();
        for (int r = 0; r < R; ++r) {
            const int64_t to = r * width + whole;
            Padded<Kept> x(before + to, rest);
            Padded<Act> y, g(grad + to, rest);
            const vf last = backward(x.numbers, bias, y.numbers, g.numbers);
            y.give(act + to, rest), g.give(grad + to, rest);
            for (int i = 0; i < rest; ++i) sums[whole + i] += last[i];
        }
    }

    static void row_on(const GeluArgs* a, int64_t row) {
        const int64_t width = a->width, whole = width / W * W, at = row * width;
        const int rest = int(width - whole);
        const Act* const before = (const Act*)a->before + at;
        Act* const act = (Act*)a->act + at;
        Kept* const kept = a->kept ? (Kept*)a->kept + at : nullptr;
        for (int64_t c = 0; c < whole; c += W)
            forward(before + c, a->bias ? load(a->bias + c) : vf{}, kept ? kept + c : nullptr,
                    act + c);
        if (!rest) return;
        Padded<Act> x(before + whole, rest), y;
        Padded<Kept> k;
        forward(x.numbers, Padded<float>(a->bias ? a->bias + whole : nullptr, rest).vector(),
                k.numbers, y.numbers);
        y.give(act + whole, rest);
        if (kept) k.give(kept + whole, rest);
    }

    static void rows(const GeluArgs* a, int64_t block, int backward_pass) {
        const int64_t step = rows_of_block(a->width), end = least(a->rows, (block + 1) * step);
        int64_t row = block * step;
        if (!backward_pass) {
            for (; row < end; ++row) row_on(a, row);
            return;
        }
        float* const sums = a->partial + block * a->width;
        memset(sums, 0, a->width * sizeof(float));
        for (; row + 4 <= end; row += 4) rows_back<4>(a, row, sums);
        for (; row < end; ++row) rows_back<1>(a, row, sums);
    }

    // The last numbers of a row, zeros behind.
    template <class T>
    struct Padded {
        T numbers[W] = {};
        Padded() {}
        Padded(const T* from, int count) { if (from) memcpy(numbers, from, count * sizeof(T)); }
        void give(T* to, int count) const { memcpy(to, numbers, count * sizeof(T)); }
        vf vector() const { return load(numbers); }
    };
};

static void gelu(const GeluArgs* a, int64_t block, int backward) {
    const auto run = a->act_dtype == WA_BF16 ? Gelu<Bf16, Bf16>::rows
                     : a->act_dtype == WA_F16 ? Gelu<Half, Half>::rows
                     : a->kept_dtype == WA_BF16 ? Gelu<Bf16, float>::rows
                     : a->kept_dtype == WA_F16 ? Gelu<Half, float>::rows : Gelu<float, float>::rows;
    run(a, block, backward);
}

}  // namespace WA_ISA
}  // namespace wa
