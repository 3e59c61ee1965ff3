// Which of the kernels for windows of up to 64 tokens serves a problem; one .cu file a data type,
// so that they compile side by side.
#pragma once
#include "small_backward.h"
#include "small_forward.h"

inline bool is_lean(const SmallProblem& p) {
    return p.a.head_dim == 32 && p.tokens > 48 && !p.a.post && !p.threshold;
}

template <class K> int launch_forward(const SmallProblem& p, void* stream) {
    return launch(small_forward<K>, dim3(p.a.heads, p.splits), dim3(K::THREADS), K::SHARED, stream,
                  p);
}
template <class K> int run_forward(const SmallProblem& p, void* stream) {
    return has_epilogue(p.a) ? launch_forward<typename K::WithEpilogue>(p, stream)
                              : launch_forward<K>(p, stream);
}
template <class K> int launch_backward(const SmallProblem& p, void* stream) {
    return launch(small_backward<K>, dim3(p.a.heads, p.splits), dim3(K::THREADS), K::shared(p.a),
                  stream, p);
}
template <class K> int run_backward(const SmallProblem& p, void* stream) {
    return has_epilogue(p.a) ? launch_backward<typename K::WithEpilogue>(p, stream)
                              : launch_backward<K>(p, stream);
}

template <typename T, int NT> int lean_forward(const SmallProblem& p, void* stream) {
    const bool table = p.a.scale_rows > 1;
    if (p.a.cosine && table)
        return run_forward<ForwardKind<T, 32, NT, true, true, false>>(p, stream);
    if (p.a.cosine) return run_forward<ForwardKind<T, 32, NT, false, true, false>>(p, stream);
    if (table) return run_forward<ForwardKind<T, 32, NT, true, false, false>>(p, stream);
    return run_forward<ForwardKind<T, 32, NT, false, false, false>>(p, stream);
}
template <typename T, int NT> int lean_backward(const SmallProblem& p, void* stream) {
    const bool table = p.a.scale_rows > 1;
    if (p.a.cosine && table)
        return run_backward<BackwardKind<T, 32, NT, true, true, true>>(p, stream);
    if (p.a.cosine) return run_backward<BackwardKind<T, 32, NT, false, true, true>>(p, stream);
    if (table || p.scale_parts)
        return run_backward<BackwardKind<T, 32, NT, true, false, true>>(p, stream);
    return run_backward<BackwardKind<T, 32, NT, false, false, true>>(p, stream);
}

template <typename T, int D, int NT> using GeneralForward = ForwardKind<T, D, NT, true, true, true>;
template <typename T, int D, int NT> using GeneralBackward =
    BackwardKind<T, D, NT, true, true, false>;

template <typename T, int D> int general(const SmallProblem& p, bool backward, void* stream) {
    const bool half = p.tokens <= 32;
    if (backward)
        return half ? run_backward<GeneralBackward<T, D, 4>>(p, stream)
                    : run_backward<GeneralBackward<T, D, 8>>(p, stream);
    return half ? run_forward<GeneralForward<T, D, 4>>(p, stream)
                : run_forward<GeneralForward<T, D, 8>>(p, stream);
}

template <typename T> int run_small(const SmallProblem& p, bool backward, void* stream) {
    if (is_lean(p)) {
        if (p.tokens <= 56)
            return backward ? lean_backward<T, 7>(p, stream) : lean_forward<T, 7>(p, stream);
        return backward ? lean_backward<T, 8>(p, stream) : lean_forward<T, 8>(p, stream);
    }
#if !defined(WA_SMALL_FEW)
    if (p.a.head_dim == 16) return general<T, 16>(p, backward, stream);
    if (p.a.head_dim == 64) return general<T, 64>(p, backward, stream);
#endif
    return general<T, 32>(p, backward, stream);
}

int run_small_f16(const SmallProblem& p, bool backward, void* stream);   // small_f16.cu
int run_small_bf16(const SmallProblem& p, bool backward, void* stream);  // small_bf16.cu
