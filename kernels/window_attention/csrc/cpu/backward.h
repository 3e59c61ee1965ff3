// Backward of a group of heads of a run of windows: P is formed again from q, k and the saved
// log-sum-exp.
//
//   G = dO vᵀ * factors
//   dS = P (G - rowsum(P G))
//   H = dS * scale (cosine: * 1 / (|q_i| |k_j|))
//   dq = H k
//   dk = Hᵀ q
//   dv = (P * factors)ᵀ dO
//   d scale = dS * logits
//   d bias = dS
//   d post = P * keep / (1 - dropout) * dO vᵀ
//
// (cosine: dq - q (q dq) / |q|^2, and the same for k.) The rows of P are divided by their sums once
// more, because a rounded log-sum-exp would shift a whole row. A gradient dL of the log-sum-exp is
// taken from the sums of the rows:
//
//   dS = P (G - rowsum(P G) + dL)
//
// Epilogues: epilogue.h.
#pragma once
#include "forward.h"

namespace wa {
namespace WA_ISA {

template <class Unit>
struct Backward : Head<Unit> {
    using Base = Head<Unit>;
    static constexpr bool PAIRS = Base::PAIRS;
    using Base::channels;
    float *q, *k, *v, *g, *turned_k, *turned_v, *paired_q, *paired_k, *paired_g;  // g: grad_out
    float *logits, *map, *grads, *left, *map_pairs, *grad_pairs;  // (queries, columns) each
    float *grad_q, *grad_k, *grad_v, *kept, *line, *result;  // result: a row of out
    float beta;           // of the head at hand; 1 without an affine epilogue
    bool ended;           // there is such an epilogue, or a gradient of the log-sum-exp
    double *factor_sums;  // gradients of alpha, beta and exclusion for every head of the group
    double *of_factors;   // and for the one at hand
    Dense sum_scale, sum_bias, sum_post;  // of the head at hand
    float* sums;                           // those of every head of the group
    int64_t sum_scale_size, sum_bias_size, sum_post_size;
    double *uniforms, *uniform;
    int queries;

    Backward(const Job* j, int group, Carver* c) : Base(j, group, c) {
        const WindowAttentionArgs& a = this->a;
        const int64_t rows = this->columns;
        const int64_t width = this->width;
        const int64_t packed = rows * this->packed;
        const int64_t paired = PAIRS ? rows / 2 * width : 0;
        queries = block_of(j->area), ended = a.beta || a.grad_lse;
        q = c->take<float>(packed);
        k = c->take<float>(packed);
        v = c->take<float>(packed);
        g = c->take<float>(packed);
        turned_k = c->take<float>(packed), turned_v = c->take<float>(packed);
        paired_q = c->take<float>(paired);
        paired_k = c->take<float>(paired);
        paired_g = c->take<float>(paired);
        const int64_t block = queries * rows;
        logits = c->take<float>(block);
        map = c->take<float>(block);
        grads = c->take<float>(block);
        kept = c->take<float>(rows), result = c->take<float>(a.exclusion ? width : 0);
        const int64_t halves = PAIRS ? block / 2 : 0;
        left = c->take<float>(halves);
        map_pairs = c->take<float>(halves);
        grad_pairs = c->take<float>(halves);
        grad_q = c->take<float>(queries * width);
        grad_k = c->take<float>(rows * width);
        grad_v = c->take<float>(rows * width);
        const int64_t pairs = int64_t(j->area) * rows;
        sum_scale.row = a.scale_rows == 1 ? 0 : rows, sum_bias.row = sum_post.row = rows;
        sum_scale_size = !a.grad_scale ? 0 : a.scale_rows == 1 ? rows : pairs;
        sum_bias_size = a.grad_bias ? pairs : 0, sum_post_size = a.grad_post ? pairs : 0;
        sums = c->take<float>((sum_scale_size + sum_bias_size + sum_post_size) * j->group);
        uniforms = c->take<double>(j->group), factor_sums = c->take<double>(3 * j->group);
        line = (float*)c->take<double>(j->offsets);
    }

    template <class T>
    void run(int run_index) {
        const Job* job = this->job;
        memset(sums, 0,
               (sum_scale_size + sum_bias_size + sum_post_size) * this->heads * sizeof(float));
        memset(uniforms, 0, this->heads * sizeof(double));
        memset(factor_sums, 0, 3 * this->heads * sizeof(double));
        const int64_t end = least(job->windows, int64_t(run_index + 1) * job->run);
        for (int64_t index = int64_t(run_index) * job->run; index < end; ++index) {
            this->go_to(index);
            for (int slot = 0; slot < this->heads; ++slot) select_head(slot), window<T>(index);
        }
        for (int slot = 0; slot < this->heads; ++slot) {
            select_head(slot);
            write_table_gradients(run_index);
        }
    }

    void select_head(int slot) {
        this->choose(slot);
        sum_scale.at = sums + slot * (sum_scale_size + sum_bias_size + sum_post_size);
        sum_bias.at = sum_scale.at + sum_scale_size;
        sum_post.at = sum_bias.at + sum_bias_size;
        uniform = uniforms + slot, of_factors = factor_sums + 3 * slot;
        beta = this->a.beta ? this->a.beta[this->head] : 1;
    }

    // Writes the gradients of tables and factors from this head and run.
    void write_table_gradients(int run_index) {
        const Job* job = this->job;
        const WindowAttentionArgs& a = this->a;
        float* to = job->partial +
                    (int64_t(this->head) * job->runs + run_index) * job->partial_size;
        if (a.grad_scale && a.scale_rows == 1) *to++ = float(*uniform);
        else if (a.grad_scale) {
            collect(job, sum_scale.at, this->columns, (double*)line, to);
            to += job->offsets;
        }
        if (a.grad_bias) {
            collect(job, sum_bias.at, this->columns, (double*)line, to);
            to += job->offsets;
        }
        if (a.grad_post) {
            collect(job, sum_post.at, this->columns, (double*)line, to);
            to += job->offsets;
        }
        if (a.grad_alpha) *to++ = float(of_factors[0]);
        if (a.grad_beta) *to++ = float(of_factors[1]);
        if (a.grad_exclusion) *to = float(of_factors[2]);
    }

    template <class T>
    void window(int64_t index) {
        const WindowAttentionArgs& a = this->a;
        const int columns = this->columns;
        const int width = this->width;
        const int packed = this->packed;
        const int area = this->job->area;
        const T* const from = (const T*)a.qkv;
        this->take(from, 3, 0, q);
        this->take(from, 3, 1, k);
        this->take(from, 3, 2, v);
        this->take((const T*)a.grad_out, 1, 0, g);
        turn(k, packed, turned_k, columns, columns, packed);
        turn(v, packed, turned_v, columns, columns, packed);
        if (a.grad_alpha) of_factors[0] += multiply_rows(*this, g, v);
        if (a.exclusion) differentiate_exclusion<T>(index);
        if (PAIRS) {
            pair_rows(q, packed, paired_q, columns, width);
            pair_rows(k, packed, paired_k, columns, width);
            pair_rows(g, packed, paired_g, columns, width);
        }
        if (a.cosine) {
            this->invert_norms(q, this->inverse_q);
            this->invert_norms(k, this->inverse_k);
        }
        for (int first = 0; first < area; first += queries) {
            const int count = int(least(queries, area - first));
            const int units = (count + Unit::SIZE - 1) / Unit::SIZE;
            product<Unit>({q + first * packed, packed, 1}, turned_k, columns, logits, columns,
                          count, columns, this->depth, false);
            product<Unit>({g + first * packed, packed, 1}, turned_v, columns, grads, columns, count,
                          columns, this->depth, false);
            const bool one_scale = a.grad_scale && a.scale_rows == 1;
            if (one_scale) memset(sum_scale.at, 0, columns * sizeof(float));
            const bool quick = columns == 4 * W && !this->has_factors();
            if (quick) quick_rows<T>(index, first, count);
            else for (int r = 0; r < count; ++r) {
                this->template prefetch<T>(first + r, true);
                row(index, first, r);
            }
            for (int n = 0; one_scale && n < area; ++n) *uniform += sum_scale.at[n];
            if (PAIRS && !quick) round_block(count);
            const Strided rows = PAIRS ? Strided{left, columns / 2, 1} : Strided{grads, columns, 1};
            product<Unit>(rows, PAIRS ? paired_k : k, width, grad_q, width, count, width,
                          this->keys, false);
            const int64_t skip = int64_t(first / Unit::SIZE) * width;
            const Strided down{PAIRS ? grad_pairs : grads, 1, columns};
            const Strided map_down{PAIRS ? map_pairs : map, 1, columns};
            product<Unit>(down, (PAIRS ? paired_q : q) + skip, width, grad_k, width, area, width,
                          units, first > 0);
            product<Unit>(map_down, (PAIRS ? paired_g : g) + skip, width, grad_v, width, area,
                          width, units, first > 0 || a.exclusion);
            for (int r = 0; r < count; ++r)
                store_gradient<T>(0, first + r, grad_q + r * width, q, this->inverse_q, LN2);
        }
        for (int j = 0; j < area; ++j) {
            store_gradient<T>(1, j, grad_k + j * width, k, this->inverse_k, LN2);
            if (a.alpha)
                mix(*this, a.alpha[this->head], g + j * packed, beta, grad_v + j * width);
            store_gradient<T>(2, j, grad_v + j * width, nullptr, nullptr, 1);
        }
    }

    // Writes token i's gradient of part 0, 1 or 2; cosine: takes out what lies along the vector
    // itself, rows of `packed`.
    template <class T>
    void store_gradient(int part, int i, float* grad, const float* packed, const float* inverse,
                        float factor) {
        const WindowAttentionArgs& a = this->a;
        const int64_t token = this->place.token[i];
        if (token < 0) return;
        if (a.cosine && packed) {
            const float* x = packed + i * this->packed;
            vf products = {};
            for (int d = 0; d < this->width; d += W) products += channels(x, d) * load(grad + d);
            const vf along = all(sum(products) * inverse[i] * inverse[i]);
            for (int d = 0; d < this->width; d += W)
                store(grad + d, load(grad + d) - channels(x, d) * along);
        }
        store_row((const float*)grad, factor,
                  (T*)a.grad_qkv + ((token * 3 + part) * a.heads + this->head) * this->dim,
                  this->dim);
    }

    // Turns dZ in `g` into dO, and begins `grad_v` with what v gets besides.
    template <class T>
    void differentiate_exclusion(int64_t index) {
        const WindowAttentionArgs& a = this->a;
        const float* const ratios = a.along + (index * a.heads + this->head) * this->job->area;
        for (int i = 0; i < this->job->area; ++i) {
            const int64_t token = this->place.token[i], at = i * this->packed;
            if (token < 0) continue;  // nothing of it is written
            const T* const from = (const T*)a.out + (token * a.heads + this->head) * this->dim;
            load_row<Floats, T>(from, result, this->dim, this->width);
            of_factors[2] += exclude_backward(*this, a.exclusion[this->head], ratios[i], v + at,
                                              result, g + at, grad_v + i * this->width);
        }
    }

    // From the logits and dO vᵀ of query i: P * factors in `map`, H in `grads`, and the sums of the
    // tables' gradients.
    void row(int64_t index, int first, int r) {
        const WindowAttentionArgs& a = this->a;
        const int i = first + r, columns = this->columns;
        float* const s = logits + r * columns;
        float* const p = map + r * columns;
        float* const h = grads + r * columns;
        if (this->place.token[i] < 0) {
            memset(p, 0, columns * sizeof(float)), memset(h, 0, columns * sizeof(float));
            return;
        }
        const int64_t at = (index * a.heads + this->head) * this->job->area + i;
        if (a.cosine) this->normalise(s, i);
        const float* const scale = this->scale.at + i * this->scale.row;
        const float* const bias = this->bias_row(i);
        const float* const factors = this->has_factors() ? this->factors_row(index, i, true)
                                                         : nullptr;
        if (factors && a.grad_post) memcpy(kept, h, columns * sizeof(float));
        const vf lse = all(a.lse[at] * LOG2E);
        vf row_sums = {}, along = {};
        for (int n = 0; n < columns; n += W) {
            const vf e = exp2v<Unit::SIZE == 1>(load(s + n) * load(scale + n) + load(bias + n) -
                                                lse);
            vf x = load(h + n);
            if (factors) x *= load(factors + n), store(h + n, x);
            row_sums += e, along += e * x;
            store(p + n, e);
        }
        const float inverse_sum = 1 / sum(row_sums);
        const vf by = all(inverse_sum), mean = all(taken_off(at, sum(along) * inverse_sum));
        float* const to_scale = sum_scale.at + i * sum_scale.row;
        float* const to_bias = sum_bias.at + i * sum_bias.row;
        if (a.grad_scale && a.grad_bias)
            differentiate<true, true>(s, p, h, scale, by, mean, to_scale, to_bias);
        else if (a.grad_scale)
            differentiate<true, false>(s, p, h, scale, by, mean, to_scale, nullptr);
        else if (a.grad_bias)
            differentiate<false, true>(s, p, h, scale, by, mean, nullptr, to_bias);
        else differentiate<false, false>(s, p, h, scale, by, mean, nullptr, nullptr);
        if (a.cosine) this->normalise(h, i);
        if (!factors) return;
        for (int n = 0; n < columns; n += W) {
            store(s + n, load(p + n));
            store(p + n, load(p + n) * load(factors + n));
        }
        if (!a.grad_post) return;
        const float* const keep = this->factors_row(index, i, false);
        float* const to_post = sum_post.at + i * sum_post.row;
        for (int n = 0; n < columns; n += W)
            store(to_post + n, load(to_post + n) +
                                   load(s + n) * load(keep + n) * (load(kept + n) * all(beta)));
    }

    // What all of a row of beta G is lessened by: beta rowsum(P G) - dL. at: of the row in lse.
    inline float taken_off(int64_t at, float mean) {
        if (!ended) return mean;
        if (this->a.grad_beta) of_factors[1] += mean;
        return beta * mean - (this->a.grad_lse ? this->a.grad_lse[at] : 0);
    }

    // As `row` and `round_block` together, for rows of four vectors, which stay in registers.
    template <class T>
    void quick_rows(int64_t index, int first, int count) {
        const WindowAttentionArgs& a = this->a;
        if (a.grad_scale && a.grad_bias) quick_rows_with<T, true, true>(index, first, count);
        else if (a.grad_scale) quick_rows_with<T, true, false>(index, first, count);
        else if (a.grad_bias) quick_rows_with<T, false, true>(index, first, count);
        else quick_rows_with<T, false, false>(index, first, count);
    }

    template <class T, bool SCALE, bool BIAS>
    void quick_rows_with(int64_t index, int first, int count) {
        const int columns = this->columns;
        for (int r = 0; r < count; r += Unit::SIZE) {
            vf p[Unit::SIZE][4] = {}, h[Unit::SIZE][4] = {};
#pragma GCC unroll 2
            for (int one = 0; one < Unit::SIZE; ++one)
                if (r + one < count) {
                    this->template prefetch<T>(first + r + one, true);
                    if (this->place.token[first + r + one] >= 0)
                        quick_row<SCALE, BIAS>(index, first, r + one, p[one], h[one]);
                }
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
                if constexpr (PAIRS) {
                    store(map_pairs + r / 2 * columns + n * W, pair(p[0][n], p[1][n]));
                    // the block has an even number of rows
                    uint16_t* const rows = (uint16_t*)left + r * columns + n * W;
                    store(grad_pairs + r / 2 * columns + n * W,
                          pair(h[0][n], h[1][n], rows, columns));
                } else {
                    store(map + r * columns + n * W, p[0][n]);
                    store(grads + r * columns + n * W, h[0][n]);
                }
            }
        }
    }

    template <bool SCALE, bool BIAS>
    inline __attribute__((always_inline)) void quick_row(int64_t index, int first, int r, vf* p,
                                                         vf* h) {
        const WindowAttentionArgs& a = this->a;
        const int i = first + r, columns = this->columns;
        float *const s = logits + r * columns, *const g_row = grads + r * columns;
        if (a.cosine) this->normalise(s, i);
        const float* const scale = this->scale.at + i * this->scale.row;
        const float* const bias = this->bias_row(i);
        const int64_t at = (index * a.heads + this->head) * this->job->area + i;
        const vf lse = all(a.lse[at] * LOG2E);
        vf row_sums = {}, along = {};
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            p[n] = exp2v<Unit::SIZE == 1>(load(s + n * W) * load(scale + n * W) +
                                          load(bias + n * W) - lse);
            row_sums += p[n], along += p[n] * load(g_row + n * W);
        }
        const float inverse_sum = 1 / sum(row_sums);
        const vf by = all(inverse_sum), mean = all(taken_off(at, sum(along) * inverse_sum));
        const vf outside = all(beta);
        float* const to_scale = sum_scale.at + i * sum_scale.row;
        float* const to_bias = sum_bias.at + i * sum_bias.row;
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            p[n] *= by;
            const vf grad = p[n] * (load(g_row + n * W) * outside - mean);
            h[n] = grad * load(scale + n * W);
            if (SCALE) store(to_scale + n * W, load(to_scale + n * W) + grad * load(s + n * W));
            if (BIAS) store(to_bias + n * W, load(to_bias + n * W) + grad);
        }
        if (a.cosine) {
            const vf own = all(this->inverse_q[i]);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) h[n] *= own * load(this->inverse_k + n * W);
        }
    }

    template <bool SCALE, bool BIAS>
    void differentiate(const float* s, float* p, float* h, const float* scale, vf by, vf mean,
                       float* to_scale, float* to_bias) {
        const vf outside = all(beta);
        for (int n = 0; n < this->columns; n += W) {
            const vf x = load(p + n) * by, grad = x * (load(h + n) * outside - mean);
            store(p + n, x), store(h + n, grad * load(scale + n));
            if (SCALE) store(to_scale + n, load(to_scale + n) + grad * load(s + n));
            if (BIAS) store(to_bias + n, load(to_bias + n) + grad);
        }
    }

    // `map` and `grads` of a block of queries as bf16: pairs along the queries of both, pairs along
    // the keys of `grads`.
    void round_block(int count) {
        const int columns = this->columns;
        for (int r = 0; r < count; r += 2) {
            const bool last = r + 1 == count;
            const float *p = map + r * columns, *h = grads + r * columns;
            for (int n = 0; n < columns; n += W) {
                store(map_pairs + r / 2 * columns + n,
                      pair(load(p + n), last ? vf{} : load(p + columns + n)));
                store(grad_pairs + r / 2 * columns + n,
                      pair(load(h + n), last ? vf{} : load(h + columns + n)));
                *(vh_any*)((uint16_t*)left + r * columns + n) = to_bf16(load(h + n));
                if (!last)
                    *(vh_any*)((uint16_t*)left + (r + 1) * columns +
                               n) = to_bf16(load(h + columns + n));
            }
        }
    }
};

}  // namespace WA_ISA
}  // namespace wa
