// Forward of a group of heads of a run of windows. No row of logits outlives its block of queries.
#pragma once
#include "epilogue.h"

namespace wa {
namespace WA_ISA {

// Queries worked on at a time: their logits (queries, columns) stay in the first-level cache, or
// for large windows in the second.
static inline int block_of(int area) {
#ifdef WA_TILES
    return area <= 144 ? 64 : 32;  // whole tiles of pairs of queries
#else
    return area <= 64 ? 64 : area <= 144 ? 48 : area <= 256 ? 32 : 16;
#endif
}

// Softmax of one row without its division: x = logits * scale + bias, the logits are left as 2^(x -
// row_max). Returns row_max and row_sum. NB: vectors in the row, which then stays in registers, or
// 0 for `columns` of them.
template <class Unit, int NB, bool FACTORS>
static inline void softmax(float* logits, const float* scale, const float* bias,
                           const float* factors, int columns, uint16_t* map, float& row_max,
                           float& row_sum) {
    const int count = NB ? NB : columns / W;
    vf in_registers[NB ? NB : 1], maxima = all(NEVER);
    for (int n = 0; n < count; ++n) {
        const vf x = load(logits + n * W) * load(scale + n * W) + load(bias + n * W);
        maxima = larger(maxima, x);
        if (NB) in_registers[n] = x;
        else store(logits + n * W, x);
    }
    row_max = largest(maxima);
    vf sums = {};
    for (int n = 0; n < count; ++n) {
        vf e = exp2v<Unit::SIZE == 1>((NB ? in_registers[n] : load(logits + n * W)) - all(row_max));
        sums += e;
        if (FACTORS) e *= load(factors + n * W);
        if (Unit::SIZE == 1) store(logits + n * W, e);
        else *(vh_any*)(map + n * W) = to_bf16(e);
    }
    row_sum = sum(sums);
}

template <class Unit>
static inline void softmax_row(float* logits, const float* scale, const float* bias,
                               const float* factors, int columns, uint16_t* map, float& row_max,
                               float& row_sum) {
    if (factors)
        softmax<Unit, 0, true>(logits, scale, bias, factors, columns, map, row_max, row_sum);
    else if (columns == 64 && W == 16)
        softmax<Unit, 4, false>(logits, scale, bias, nullptr, columns, map, row_max, row_sum);
    else softmax<Unit, 0, false>(logits, scale, bias, nullptr, columns, map, row_max, row_sum);
}

template <class Unit>
struct Forward : Head<Unit> {
    using Base = Head<Unit>;
    float *q, *k, *v, *turned_k, *paired_v, *logits, *out;
    float *row_sums, *row_maxima;  // of the rows of a block
    uint16_t* map;
    int queries;

    Forward(const Job* j, int group, Carver* c) : Base(j, group, c) {
        const int64_t rows = this->columns, packed = rows * this->packed;
        queries = block_of(j->area);
        q = c->take<float>(packed), k = c->take<float>(packed), v = c->take<float>(packed);
        turned_k = c->take<float>(packed);
        paired_v = c->take<float>(Base::PAIRS ? rows / 2 * this->width : 0);
        logits = c->take<float>(queries * rows);
        map = c->take<uint16_t>(Base::PAIRS ? queries * rows : 0);
        out = c->take<float>(int64_t(queries) * this->width);
        row_sums = c->take<float>(queries);
        row_maxima = c->take<float>(queries);
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
        const bool ended = a.alpha || a.exclusion;
        this->take(from, 3, 0, q), this->take(from, 3, 1, k), this->take(from, 3, 2, v);
        turn(k, packed, turned_k, columns, columns, packed);
        if (Base::PAIRS) pair_rows(v, packed, paired_v, columns, this->width);
        if (a.cosine) {
            this->invert_norms(q, this->inverse_q);
            this->invert_norms(k, this->inverse_k);
        }
        const float* const values = Base::PAIRS ? paired_v : v;
        const Strided map_rows = Base::PAIRS ? Strided{(const float*)map, columns / 2, 1}
                                             : Strided{logits, columns, 1};
        for (int first = 0; first < area; first += queries) {
            const int count = int(least(queries, area - first));
            product<Unit>({q + first * packed, packed, 1}, turned_k, columns, logits, columns,
                          count, columns, this->depth, false);
            for (int r = 0; r < count; ++r) {
                this->template prefetch<T>(first + r, false);
                row(index, first, r);
            }
            if (a.lse) store_lse(index, first, count);
            product<Unit>(map_rows, values, this->width, out, this->width, count, this->width,
                          this->keys, false);
            for (int r = 0; r < count; ++r) {
                const int64_t token = this->place.token[first + r];
                T* const to = (T*)a.out + (token * a.heads + this->head) * this->dim;
                if (token < 0) continue;
                float* const row = out + r * this->width;
                if (ended) finish(index, first + r, row, 1 / row_sums[r]);
                store_row((const float*)row, ended ? 1 : 1 / row_sums[r], to, this->dim);
            }
        }
    }

    void row(int64_t index, int first, int r) {
        const WindowAttentionArgs& a = this->a;
        const int i = first + r, columns = this->columns;
        float* const s = logits + r * columns;
        if (a.cosine) this->normalise(s, i);
        const float* factors = this->has_factors() ? this->factors_row(index, i, true) : nullptr;
        const float* const scale = this->scale.at + i * this->scale.row;
        softmax_row<Unit>(s, scale, this->bias_row(i), factors, columns, map + r * columns,
                          row_maxima[r], row_sums[r]);
    }

    // The epilogue of query i, in place, on row * factor.
    void finish(int64_t index, int i, float* row, float factor) const {
        const WindowAttentionArgs& a = this->a;
        const float* const value = v + i * this->packed;
        if (a.alpha) mix(*this, a.alpha[this->head], value, a.beta[this->head] * factor, row);
        else {
            const float ratio = exclude(*this, a.exclusion[this->head], value, factor, row);
            if (a.along) a.along[(index * a.heads + this->head) * this->job->area + i] = ratio;
        }
    }

    void store_lse(int64_t index, int first, int count) {
        float* const to = this->a.lse + (index * this->a.heads + this->head) * this->job->area +
                          first;
        for (int r = 0; r < count; r += W)
            store(row_maxima + r, all(LN2) * (load(row_maxima + r) + log2v(load(row_sums + r))));
        for (int r = 0; r < count; ++r)
            if (this->place.token[first + r] >= 0) to[r] = row_maxima[r];
    }
};

}  // namespace WA_ISA
}  // namespace wa
