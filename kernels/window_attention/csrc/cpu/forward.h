// Forward of a group of heads of a run of windows. No row of logits outlives its block of queries.
#pragma once
#include "windows.h"

namespace wa {
namespace WA_ISA {

// Queries worked on at a time: their logits (queries, columns) stay in the first-level cache, or for large windows in the second.
static inline int block_of(int area) {
#ifdef WA_TILES
    return area <= 144 ? 64 : 32;  // whole tiles of pairs of queries
#else
    return area <= 64 ? 64 : area <= 144 ? 48 : area <= 256 ? 32 : 16;
#endif
}

// Softmax of one row without its division: x = logits * weight + bias, the logits are left as 2^(x - max). Returns max and the sum.
// NB: vectors in the row, which then stays in registers, or 0 for `columns` of them.
template <class Unit, int NB, bool FACTORS>
static inline void soften(float* logits, const float* weight, const float* bias, const float* factors, int columns, uint16_t* map,
                          float& max, float& total) {
    const int count = NB ? NB : columns / W;
    vf kept[NB ? NB : 1], high = all(NEVER);
    for (int n = 0; n < count; ++n) {
        const vf x = load(logits + n * W) * load(weight + n * W) + load(bias + n * W);
        high = larger(high, x);
        if (NB) kept[n] = x;
        else store(logits + n * W, x);
    }
    max = largest(high);
    vf sums = {};
    for (int n = 0; n < count; ++n) {
        vf e = exp2v<Unit::SIZE == 1>((NB ? kept[n] : load(logits + n * W)) - all(max));
        sums += e;
        if (FACTORS) e *= load(factors + n * W);
        if (Unit::SIZE == 1) store(logits + n * W, e);
        else *(vh_any*)(map + n * W) = to_bf16(e);
    }
    total = sum(sums);
}

template <class Unit>
static inline void soften_row(float* logits, const float* weight, const float* bias, const float* factors, int columns, uint16_t* map,
                              float& max, float& total) {
    if (factors) soften<Unit, 0, true>(logits, weight, bias, factors, columns, map, max, total);
    else if (columns == 64 && W == 16) soften<Unit, 4, false>(logits, weight, bias, nullptr, columns, map, max, total);
    else soften<Unit, 0, false>(logits, weight, bias, nullptr, columns, map, max, total);
}

template <class Unit>
struct Forward : Head<Unit> {
    using Base = Head<Unit>;
    float *q, *k, *v, *turned_k, *paired_v, *logits, *out, *totals, *highest;  // totals, highest: sum and largest of a row of a block
    uint16_t* map;
    int queries;

    Forward(const Job* j, int group, Carver* c) : Base(j, group, c) {
        const int64_t rows = this->columns, packed = rows * this->packed;
        queries = block_of(j->area);
        q = c->take<float>(packed), k = c->take<float>(packed), v = c->take<float>(packed);
        turned_k = c->take<float>(packed);
        paired_v = c->take<float>(Base::PAIRS ? rows / 2 * this->width : 0);
        logits = c->take<float>(queries * rows), map = c->take<uint16_t>(Base::PAIRS ? queries * rows : 0);
        out = c->take<float>(int64_t(queries) * this->width), totals = c->take<float>(queries), highest = c->take<float>(queries);
    }

    template <class T>
    void run(int run_index) {
        const Job* job = this->job;
        const int64_t end = least(job->windows, int64_t(run_index + 1) * job->run);
        for (int64_t index = int64_t(run_index) * job->run; index < end; ++index) {
            this->go_to(index);
            for (int slot = 0; slot < this->heads; ++slot) this->choose(slot), window<T>(index);
        }
    }

    template <class T>
    void window(int64_t index) {
        const WindowAttentionArgs& a = this->a;
        const int columns = this->columns, packed = this->packed, area = this->job->area;
        const T* const from = (const T*)a.qkv;
        this->take(from, 3, 0, q), this->take(from, 3, 1, k), this->take(from, 3, 2, v);
        turn(k, packed, turned_k, columns, columns, packed);
        if (Base::PAIRS) pair_rows(v, packed, paired_v, columns, this->width);
        if (a.cosine) this->invert_norms(q, this->inverse_q), this->invert_norms(k, this->inverse_k);
        const float* const values = Base::PAIRS ? paired_v : v;
        const Strided weights = Base::PAIRS ? Strided{(const float*)map, columns / 2, 1} : Strided{logits, columns, 1};
        for (int first = 0; first < area; first += queries) {
            const int count = int(least(queries, area - first));
            product<Unit>({q + first * packed, packed, 1}, turned_k, columns, logits, columns, count, columns, this->depth, false);
            for (int r = 0; r < count; ++r) this->template ask<T>(first + r, false), row(index, first, r);
            if (a.lse) give_lse(index, first, count);
            product<Unit>(weights, values, this->width, out, this->width, count, this->width, this->keys, false);
            for (int r = 0; r < count; ++r) {
                const int64_t token = this->place.token[first + r];
                T* const to = (T*)a.out + (token * a.heads + this->head) * this->dim;
                if (token >= 0) give_row((const float*)out + r * this->width, 1 / totals[r], to, this->dim);
            }
        }
    }

    void row(int64_t index, int first, int r) {
        const WindowAttentionArgs& a = this->a;
        const int i = first + r, columns = this->columns;
        float* const s = logits + r * columns;
        if (a.cosine) this->normalise(s, i);
        const float* factors = this->has_factors() ? this->factors_row(index, i, true) : nullptr;
        const float* const weight = this->weight.at + i * this->weight.row;
        soften_row<Unit>(s, weight, this->bias_row(i), factors, columns, map + r * columns, highest[r], totals[r]);
    }

    void give_lse(int64_t index, int first, int count) {
        float* const to = this->a.lse + (index * this->a.heads + this->head) * this->job->area + first;
        for (int r = 0; r < count; r += W) store(highest + r, all(LN2) * (load(highest + r) + log2v(load(totals + r))));
        for (int r = 0; r < count; ++r)
            if (this->place.token[first + r] >= 0) to[r] = highest[r];
    }
};

}  // namespace WA_ISA
}  // namespace wa
