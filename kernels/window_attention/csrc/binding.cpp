// The operations as PyTorch sees them: shapes are checked, outputs allocated, and the kernel of the
// tensors' device is called. Only libtorch's stable ABI is used, so that one binary serves every
// PyTorch from 2.10 on, with any Python, with or without CUDA.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "args.h"
#include "kernels.h"

#ifdef WA_WITH_CUDA
#include <dlfcn.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Table = std::optional<Tensor>;

struct Options {
    std::vector<int64_t> window, shift;
    int64_t heads;
    bool cosine;
    double mask_value, dropout;
};

int64_t rows_of(const Options& o) { return (2 * o.window[0] - 1) * (2 * o.window[1] - 1); }  // T

int dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return WA_F32;
        case ScalarType::Half: return WA_F16;
        case ScalarType::BFloat16: return WA_BF16;
        default:
            STD_TORCH_CHECK(false, "window_attention: qkv must be float32, float16 or bfloat16");
    }
    return -1;
}

// Devices without an index of their own have -1 or 0.
bool together(const Tensor& x, const Tensor& y) {
    return x.is_cpu() ? y.is_cpu()
                      : x.is_cuda() == y.is_cuda() && x.is_cpu() == y.is_cpu() &&
                            x.get_device_index() == y.get_device_index();
}

void check_table(const Table& table, const char* name, const Tensor& qkv, const Options& o,
                 bool one_row_allowed) {
    if (!table) return;
    STD_TORCH_CHECK(table->scalar_type() == ScalarType::Float, "window_attention: ", name,
                    " must be float32");
    STD_TORCH_CHECK(
        together(*table, qkv), "window_attention: ", name, " and qkv are on different devices");
    STD_TORCH_CHECK(
        table->dim() == 2 && table->size(1) == o.heads &&
            (table->size(0) == rows_of(o) || (one_row_allowed && table->size(0) == 1)),
        "window_attention: ", name, " must be (", rows_of(o), one_row_allowed ? " or 1" : "", ", ",
        o.heads, "): a row for each offset between two tokens of a window, a column for each head");
}

void check_factor(const Table& factor, const char* name, const Tensor& qkv, const Options& o) {
    STD_TORCH_CHECK(!factor || (factor->scalar_type() == ScalarType::Float &&
                                together(*factor, qkv) && factor->dim() == 1 &&
                                factor->size(0) == o.heads),
                    "window_attention: ", name, " must be (", o.heads,
                    ",), a number for each head, in float32 on the device of qkv");
}

// All inputs but qkv, contiguous.
struct Terms {
    Terms(const Tensor& scale, const Table& bias, const Table& post, const Table& alpha,
          const Table& beta, const Table& exclusion, const Table& seed)
        : scale(torch::stable::contiguous(scale)), bias(contiguous(bias)), post(contiguous(post)),
          alpha(contiguous(alpha)), beta(contiguous(beta)), exclusion(contiguous(exclusion)),
          seed(seed) {}
    static Table contiguous(const Table& x) { return x ? Table(torch::stable::contiguous(*x)) : x; }
    Tensor scale;
    Table bias, post, alpha, beta, exclusion, seed;
};

const float* floats_of(const Table& x) {
    return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
}

WindowAttentionArgs describe(const Tensor& qkv, const Terms& t, const Options& o) {
    STD_TORCH_CHECK(o.window.size() == 2 && o.shift.size() == 2,
                    "window_attention: window and shift are pairs (rows, columns)");
    for (int axis = 0; axis < 2; ++axis)
        STD_TORCH_CHECK(o.window[axis] >= 1 && o.shift[axis] >= 0 && o.shift[axis] < o.window[axis],
                        "window_attention: window ", o.window[axis], " with shift ", o.shift[axis],
                        "; 0 <= shift < window is needed");
    STD_TORCH_CHECK(qkv.dim() == 4 && o.heads >= 1 && qkv.size(3) % (3 * o.heads) == 0,
                    "window_attention: qkv must be (B, H, W, 3 * heads * head_dim) for ", o.heads,
                    " heads");
    STD_TORCH_CHECK(o.dropout >= 0 && o.dropout < 1, "window_attention: dropout ", o.dropout,
                    " is not in [0, 1)");
    STD_TORCH_CHECK(o.dropout == 0 || (t.seed && t.seed->scalar_type() == ScalarType::Long &&
                                       t.seed->numel() == 1 && together(*t.seed, qkv)),
                    "window_attention: dropout needs a seed, one int64 on the device of qkv");
    check_table(t.scale, "scale", qkv, o, true);
    check_table(t.bias, "bias", qkv, o, false);
    check_table(t.post, "post", qkv, o, false);
    check_factor(t.alpha, "alpha", qkv, o);
    check_factor(t.beta, "beta", qkv, o);
    check_factor(t.exclusion, "exclusion", qkv, o);
    WindowAttentionArgs a{};
    a.qkv = qkv.const_data_ptr();
    a.scale = static_cast<const float*>(t.scale.const_data_ptr());
    a.bias = floats_of(t.bias), a.post = floats_of(t.post);
    a.alpha = floats_of(t.alpha), a.beta = floats_of(t.beta);
    a.exclusion = floats_of(t.exclusion);
    a.seed = o.dropout > 0 ? static_cast<const int64_t*>(t.seed->const_data_ptr()) : nullptr;
    a.batch = static_cast<int32_t>(qkv.size(0));
    a.height = static_cast<int32_t>(qkv.size(1));
    a.width = static_cast<int32_t>(qkv.size(2));
    a.heads = static_cast<int32_t>(o.heads);
    a.head_dim = static_cast<int32_t>(qkv.size(3) / (3 * o.heads));
    for (int axis = 0; axis < 2; ++axis) {
        a.window[axis] = static_cast<int32_t>(o.window[axis]);
        a.shift[axis] = static_cast<int32_t>(o.shift[axis]);
    }
    a.scale_rows = static_cast<int32_t>(t.scale.size(0));
    a.cosine = o.cosine;
    a.dtype = dtype_of(qkv);
    a.threads = 1;
    a.mask_value = static_cast<float>(o.mask_value);
    a.dropout = static_cast<float>(o.dropout);
    return a;
}

int64_t windows_of(const WindowAttentionArgs& a) {
    return int64_t((a.height + a.window[0] - 1) / a.window[0]) *
           ((a.width + a.window[1] - 1) / a.window[1]);
}

// A kernel of one device: the C functions of kernels.h with the stream bound.
void in_threads_of_torch(int64_t count, void (*body)(int64_t, int64_t, void*), void* of) {
    torch::stable::parallel_for(0, count, 1,
                                [=](int64_t begin, int64_t end) { body(begin, end, of); });
}

struct Cpu {
    explicit Cpu(const Tensor&) {
        static const bool once = (wa_cpu_set_parallel_for(in_threads_of_torch), true);
        (void)once;
    }
    void prepare(WindowAttentionArgs& a) const {
        a.threads = static_cast<int32_t>(torch::stable::get_num_threads());
    }
    const char* unsupported(const WindowAttentionArgs& a) const { return wa_cpu_supports(&a); }
    int64_t workspace(const WindowAttentionArgs& a, int backward) const {
        return wa_cpu_workspace(&a, backward);
    }
    int run(const WindowAttentionArgs& a, int backward) const {
        return backward ? wa_cpu_backward(&a) : wa_cpu_forward(&a);
    }
};

#ifdef WA_WITH_CUDA
// Found at run time: a PyTorch without CUDA has no such function, and the CPU kernel of this same
// library must load there.
void* current_stream(int32_t device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto function = [] {
        void* found = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
        if (!found)
            if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
                found = dlsym(library, "aoti_torch_get_current_cuda_stream");
        return reinterpret_cast<Function>(found);
    }();
    STD_TORCH_CHECK(function, "window_attention: this PyTorch was built without CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(function(device, &stream) == 0,
                    "window_attention: PyTorch gave no stream for CUDA device ", device);
    return stream;
}

struct Cuda {
    explicit Cuda(const Tensor& x)
        : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
    void prepare(WindowAttentionArgs&) const {}
    const char* unsupported(const WindowAttentionArgs& a) const { return wa_cuda_supports(&a); }
    int64_t workspace(const WindowAttentionArgs& a, int backward) const {
        return wa_cuda_workspace(&a, backward);
    }
    int run(const WindowAttentionArgs& a, int backward) const {
        return backward ? wa_cuda_backward(&a, stream) : wa_cuda_forward(&a, stream);
    }
    torch::stable::accelerator::DeviceGuard guard;
    void* stream;
};
#endif

template <class Device>
void call(const Device& device, WindowAttentionArgs& a, const Tensor& like, int backward) {
    const char* clause = device.unsupported(a);
    STD_TORCH_CHECK(!clause, "window_attention: ", clause);
    const int64_t bytes = device.workspace(a, backward);
    Tensor scratch;
    if (bytes > 0) {
        scratch = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
        a.workspace = scratch.mutable_data_ptr();
    }
    const int code = device.run(a, backward);
    STD_TORCH_CHECK(code == 0, "window_attention: the kernel's ", backward ? "backward" : "forward",
                    " failed with code ", code);
}

// Kernels read by vectors: contiguous, from a multiple of 16 bytes on; a copy where x is not.
Tensor whole(const Tensor& x) {
    const Tensor y = torch::stable::contiguous(x);
    return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 ? torch::stable::clone(y) : y;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> forward(Tensor qkv, Tensor scale, Table bias, Table post,
                                           Table alpha, Table beta, Table exclusion, Table seed,
                                           std::vector<int64_t> window, std::vector<int64_t> shift,
                                           int64_t num_heads, bool cosine, double mask_value,
                                           double dropout, bool need_lse) {
    const Options o{window, shift, num_heads, cosine, mask_value, dropout};
    const Terms terms{scale, bias, post, alpha, beta, exclusion, seed};
    qkv = whole(qkv);
    WindowAttentionArgs a = describe(qkv, terms, o);
    const Device device(qkv);
    device.prepare(a);
    Tensor out = torch::stable::new_empty(qkv,
                                          {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3});
    const std::vector<int64_t> rows{a.batch, windows_of(a), a.heads, o.window[0] * o.window[1]};
    // the kernel leaves the rows of padding as they are
    const bool padded = a.height % a.window[0] || a.width % a.window[1];
    const auto of_rows = [&](bool needed, float*& pointer) {
        if (!needed) return torch::stable::new_empty(qkv, {0}, ScalarType::Float);
        Tensor made = padded ? torch::stable::new_zeros(qkv, rows, ScalarType::Float)
                             : torch::stable::new_empty(qkv, rows, ScalarType::Float);
        pointer = static_cast<float*>(made.mutable_data_ptr());
        return made;
    };
    Tensor lse = of_rows(need_lse, a.lse);
    Tensor along = of_rows(need_lse && exclusion, a.along);
    a.out = out.mutable_data_ptr();
    if (out.numel() > 0) call(device, a, qkv, 0);
    return {out, lse, along};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, Table grad_lse, Tensor qkv, Table out, Tensor lse, Table along, Tensor scale,
    Table bias, Table post, Table alpha, Table beta, Table exclusion, Table seed,
    std::vector<int64_t> window, std::vector<int64_t> shift, int64_t num_heads, bool cosine,
    double mask_value, double dropout, bool need_scale, bool need_bias, bool need_post,
    bool need_alpha, bool need_beta, bool need_exclusion) {
    const Options o{window, shift, num_heads, cosine, mask_value, dropout};
    const Terms terms{scale, bias, post, alpha, beta, exclusion, seed};
    qkv = whole(qkv);
    grad_out = whole(grad_out), lse = torch::stable::contiguous(lse);
    if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
    WindowAttentionArgs a = describe(qkv, terms, o);
    const auto check_result = [&](const Tensor& x, const char* name) {
        bool fits = x.scalar_type() == qkv.scalar_type() && together(x, qkv) && x.dim() == 4;
        for (int axis = 0; fits && axis < 4; ++axis)
            fits = x.size(axis) * (axis == 3 ? 3 : 1) == qkv.size(axis);
        STD_TORCH_CHECK(fits, "window_attention: ", name, " must be like the output: (B, H, W, C), "
                        "of the dtype and on the device of qkv");
    };
    const auto check_rows = [&](const Tensor& x, const char* name, const char* what) {
        STD_TORCH_CHECK(
            x.scalar_type() == ScalarType::Float && together(x, qkv) &&
                x.numel() == a.batch * windows_of(a) * a.heads * a.window[0] * a.window[1],
            "window_attention: ", name, " is not ", what);
    };
    check_result(grad_out, "grad_out");
    check_rows(lse, "lse", "what the forward returns with need_lse");
    if (grad_lse) check_rows(*grad_lse, "grad_lse", "like lse");
    if (exclusion) {
        STD_TORCH_CHECK(out && along, "window_attention: the backward of the exclusive epilogue "
                                      "needs out and along, as the forward returned them");
        out = whole(*out), along = torch::stable::contiguous(*along);
        check_result(*out, "out");
        check_rows(*along, "along", "what the forward returns with need_lse");
        a.out = const_cast<void*>(out->const_data_ptr());
        a.along = const_cast<float*>(floats_of(along));
    }
    const Device device(qkv);
    device.prepare(a);
    // then no kernel runs, and the gradients of the tables are sums of nothing
    const bool empty = qkv.numel() == 0;
    auto table = [&](const Table& like, bool needed, float*& pointer) {
        if (!needed || !like) return torch::stable::new_empty(qkv, {0}, ScalarType::Float);
        Tensor grad = empty ? torch::stable::new_zeros(*like, like->sizes())
                            : torch::stable::empty_like(*like);
        pointer = static_cast<float*>(grad.mutable_data_ptr());
        return grad;
    };
    Tensor grad_qkv = torch::stable::empty_like(qkv);
    a.grad_qkv = grad_qkv.mutable_data_ptr();
    Tensor grad_scale = table(terms.scale, need_scale, a.grad_scale);
    Tensor grad_bias = table(terms.bias, need_bias, a.grad_bias);
    Tensor grad_post = table(terms.post, need_post, a.grad_post);
    Tensor grad_alpha = table(terms.alpha, need_alpha, a.grad_alpha);
    Tensor grad_beta = table(terms.beta, need_beta, a.grad_beta);
    Tensor grad_exclusion = table(terms.exclusion, need_exclusion, a.grad_exclusion);
    a.grad_out = grad_out.const_data_ptr();
    a.grad_lse = floats_of(grad_lse);
    a.lse = static_cast<float*>(lse.mutable_data_ptr());
    if (!empty) call(device, a, qkv, 1);
    return {grad_qkv, grad_scale, grad_bias, grad_post, grad_alpha, grad_beta, grad_exclusion};
}

// GELU between two linear layers, on the CPU.
GeluArgs describe_gelu(const Tensor& before, const Table& bias, const Tensor& act,
                       ScalarType kept) {
    const char* const what =
        "gelu: contiguous matrices of one shape on the CPU, in one of float32, float16 and "
        "bfloat16 (what is kept also in "
        "16 bits beside float32), and a float32 bias for its columns are needed";
    auto fits = [&](const Tensor& x) { return x.is_cpu() && x.is_contiguous() && x.dim() == 2; };
    STD_TORCH_CHECK(
        fits(before) && fits(act) && before.size(0) == act.size(0) && before.size(1) == act.size(1),
        what);
    STD_TORCH_CHECK(
        !bias || (bias->is_cpu() && bias->is_contiguous() && bias->dim() == 1 &&
                  bias->size(0) == act.size(1) && bias->scalar_type() == ScalarType::Float),
        what);
    const auto narrow = [](ScalarType t) {
        return t == ScalarType::Half || t == ScalarType::BFloat16;
    };
    STD_TORCH_CHECK(act.scalar_type() == ScalarType::Float
                        ? kept == ScalarType::Float || narrow(kept)
                        : narrow(kept) && kept == act.scalar_type(),
                    what);
    GeluArgs a{};
    a.before = before.const_data_ptr();
    a.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    a.act = act.mutable_data_ptr();
    a.rows = act.size(0), a.width = act.size(1);
    a.act_dtype = dtype_of(act);
    a.kept_dtype = kept == act.scalar_type()  ? a.act_dtype
                   : kept == ScalarType::Half ? WA_F16
                                              : WA_BF16;
    a.threads = static_cast<int32_t>(torch::stable::get_num_threads());
    return a;
}

void gelu_forward(Tensor before, Table bias, Table kept, Tensor act) {
    const Cpu pool(act);
    GeluArgs a = describe_gelu(before, bias, act, kept ? kept->scalar_type() : act.scalar_type());
    STD_TORCH_CHECK(
        before.scalar_type() == act.scalar_type() &&
            (!kept || (kept->is_cpu() && kept->is_contiguous() && kept->numel() == act.numel())),
        "gelu: what is kept must be of the shape of the product, the rest of its dtype");
    a.kept = kept ? kept->mutable_data_ptr() : nullptr;
    STD_TORCH_CHECK(wa_cpu_gelu(&a, 0) == 0, "gelu: the kernel failed");
}

Tensor gelu_backward(Tensor kept, Table bias, Tensor act, Tensor grad) {
    const Cpu pool(act);
    GeluArgs a = describe_gelu(kept, bias, act, kept.scalar_type());
    STD_TORCH_CHECK(grad.scalar_type() == act.scalar_type() && grad.is_cpu() &&
                        grad.is_contiguous() && grad.numel() == act.numel(),
                    "gelu: the gradient must be like the activation");
    Tensor grad_bias = torch::stable::new_empty(act, {a.width}, ScalarType::Float);
    const Tensor partial = torch::stable::new_empty(
        act, {wa_cpu_gelu_blocks(a.rows, a.width), a.width}, ScalarType::Float);
    a.grad = grad.mutable_data_ptr();
    a.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
    a.partial = static_cast<float*>(partial.mutable_data_ptr());
    STD_TORCH_CHECK(wa_cpu_gelu(&a, 1) == 0, "gelu: the kernel failed");
    return grad_bias;
}

}  // namespace

STABLE_TORCH_LIBRARY(idsw, m) {
    m.def(
        "window_attention_forward(Tensor qkv, Tensor scale, Tensor? bias, Tensor? post, "
        "Tensor? alpha, Tensor? beta, Tensor? exclusion, Tensor? seed, int[] window, int[] shift, "
        "int num_heads, bool cosine, float mask_value, float dropout, bool need_lse) "
        "-> (Tensor out, Tensor lse, Tensor along)");
    m.def(
        "window_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor qkv, Tensor? out, "
        "Tensor lse, Tensor? along, Tensor scale, Tensor? bias, Tensor? post, Tensor? alpha, "
        "Tensor? beta, Tensor? exclusion, Tensor? seed, int[] window, int[] shift, int num_heads, "
        "bool cosine, float mask_value, float dropout, bool need_scale, bool need_bias, "
        "bool need_post, bool need_alpha, bool need_beta, bool need_exclusion) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def("gelu_forward(Tensor before, Tensor? bias, Tensor(a!)? kept, Tensor(b!) act) -> ()");
    m.def("gelu_backward(Tensor kept, Tensor? bias, Tensor(a!) act, Tensor(b!) grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(idsw, CPU, m) {
    m.impl("window_attention_forward", TORCH_BOX(&forward<Cpu>));
    m.impl("window_attention_backward", TORCH_BOX(&backward<Cpu>));
    m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
    m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

#ifdef WA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(idsw, CUDA, m) {
    m.impl("window_attention_forward", TORCH_BOX(&forward<Cuda>));
    m.impl("window_attention_backward", TORCH_BOX(&backward<Cuda>));
}
#endif
