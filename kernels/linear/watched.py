"""Whether somebody wraps, hooks or replaces a layer, or looks at single operations: then it is
called as any module is.
"""

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from kernels.derivatives import is_transformed

_modules = nn.modules.module
_HOOKS_OF_ALL = (
    _modules._global_forward_hooks,
    _modules._global_forward_pre_hooks,
    _modules._global_backward_hooks,
    _modules._global_backward_pre_hooks,
)
_AS_SHIPPED = (nn.Module.__call__, nn.Linear.forward)


def is_observed() -> bool:
    """Whether something looks at single operations and must see an ordinary product: a compiler, a
    tracer, torch.func, forward mode, or a mode such as a FLOP counter or fake tensors.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or any(map(_sees_functions, range(torch._C._len_torch_function_stack())))
        or is_transformed()
        or torch._C._get_tracing_state()
    )


def is_cpu_inference(x: Tensor) -> bool:
    """Whether a product with x on the CPU needs neither gradients nor to be an ordinary one."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not is_observed()


def is_untouched(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` does what one of the classes `kinds` does, and nothing else: it is
    no subclass, and has neither hooks nor a forward of its own. Hooks of all modules do not count.
    """
    if type(module) not in kinds or _has_hooks(module):
        return False
    return torch.compiler.is_compiling() or not (
        "forward" in vars(module) or module._compiled_call_impl is not None
    )


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` is a linear layer whose product may be computed without calling it: an
    untouched nn.Linear with ordinary parameters, and no hook of all modules.
    """
    if not is_untouched(layer, nn.Linear):
        return False
    if torch.compiler.is_compiling():
        return True
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (
        isinstance(weight, Tensor)
        and is_ordinary(weight)
        and (bias is None or is_ordinary(bias))
        and not are_all_hooked()
        and (nn.Module.__call__, nn.Linear.forward) == _AS_SHIPPED
    )


def are_all_hooked() -> bool:
    """Whether the process has a hook for all modules."""
    return any(_HOOKS_OF_ALL)


def is_ordinary(tensor: Tensor) -> bool:
    """Whether it is a tensor or parameter of PyTorch's own class (quantized and distributed ones
    are not) whose writes are counted (those of inference mode are not).
    """
    return type(tensor) in (nn.Parameter, Tensor) and not tensor.is_inference()


def _sees_functions(place: int) -> bool:
    """Whether the function mode at this place of the stack is more than a default device."""
    return not isinstance(torch._C._get_function_stack_at(place), DeviceContext)


def _has_hooks(module: nn.Module) -> bool:
    return (
        len(module._forward_hooks) > 0
        or len(module._forward_pre_hooks) > 0
        or len(module._backward_hooks) > 0
        or len(module._backward_pre_hooks) > 0
    )
