"""Calls a compiled kernel (CPU, CUDA or emulated CUDA) on a case, through its C interface.

`Call` lays the tensors out as csrc/args.h wants them, each between margins of NaN, so that what is
read out of place shows in the result, and what is written out of place in the margins.
"""

import ctypes

import torch
from torch import Tensor

from kernels.window_attention import window_layout

from .testing import EPILOGUES, TABLES, Case, Drawn

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MARGIN = 64  # elements before and after each tensor
EPILOGUE = tuple(name for names in EPILOGUES.values() for name in names)
GRADIENTS = ("qkv", *TABLES, *EPILOGUE)
INPUTS = (*GRADIENTS, "seed", "grad_out", "grad_lse")
POINTERS = (
    *("qkv", *TABLES, *EPILOGUE, "seed", "out", "lse", "along", "grad_out", "grad_lse"),
    *(f"grad_{name}" for name in GRADIENTS),
)


class KernelError(RuntimeError):
    """The kernel returned a code other than 0."""


class Arguments(ctypes.Structure):
    """WindowAttentionArgs of csrc/args.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*POINTERS, "workspace")),
        *((name, ctypes.c_int32) for name in ("batch", "height", "width", "heads", "head_dim")),
        ("window", ctypes.c_int32 * 2),
        ("shift", ctypes.c_int32 * 2),
        *((name, ctypes.c_int32) for name in ("scale_rows", "cosine", "dtype", "threads")),
        ("mask_value", ctypes.c_float),
        ("dropout", ctypes.c_float),
    ]


class Guarded:
    """A tensor in the middle of a larger one of NaN (integers: of the smallest number)."""

    def __init__(self, shape, dtype: torch.dtype, content: Tensor | None = None):
        count = torch.Size(shape).numel()
        filling = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        self.whole = torch.full((count + 2 * MARGIN,), filling, dtype=dtype)
        self.tensor = self.whole[MARGIN : MARGIN + count].view(shape)
        if content is not None:
            self.tensor.copy_(content)
        self.before = self.whole.clone()

    def intact(self) -> bool:
        """Whether nothing was written into the margins."""
        ends = slice(None, MARGIN), slice(-MARGIN, None)
        return all(_same(self.whole[end], self.before[end]) for end in ends)

    def unchanged(self) -> bool:
        """Whether nothing was written into the tensor."""
        inside = slice(MARGIN, -MARGIN)
        return _same(self.whole[inside], self.before[inside])


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        a, b = a.nan_to_num(-7), b.nan_to_num(-7)
    return torch.equal(a, b)


class Call:
    """The tensors of a case laid out for the C interface.

    gradients: names among GRADIENTS that the backward is to give.
    lse: whether the forward is to keep what the backward needs, the log-sum-exp of each row above
        all.
    """

    def __init__(self, drawn: Drawn, gradients: tuple[str, ...] = GRADIENTS, lse: bool = True):
        c = drawn.case
        self.case = c
        layout = window_layout(c.grid, c.window, c.shift, c.mask_value)
        self.buffers = {
            "qkv": Guarded(drawn.qkv.shape, c.dtype, drawn.qkv),
            "out": Guarded(drawn.grad_out.shape, c.dtype),
            "grad_out": Guarded(drawn.grad_out.shape, c.dtype, drawn.grad_out),
        }
        for name in (*TABLES, *EPILOGUE):
            if (table := getattr(drawn, name)) is not None:
                self.buffers[name] = Guarded(table.shape, torch.float32, table)
        if c.dropout:
            self.buffers["seed"] = Guarded((1,), torch.int64, drawn.seed)
        if lse:
            shape = (c.batch, layout.num_windows, c.heads, layout.area)
            self.buffers["lse"] = Guarded(shape, torch.float32)
            if c.epilogue == "exclusive":
                self.buffers["along"] = Guarded(shape, torch.float32)
        if c.lse:
            self.buffers["grad_lse"] = Guarded(drawn.grad_lse.shape, torch.float32, drawn.grad_lse)
        for name in gradients:
            if name in self.buffers:
                like = self.buffers[name].tensor
                self.buffers[f"grad_{name}"] = Guarded(like.shape, like.dtype)
        self.args = Arguments(
            batch=c.batch,
            height=c.grid[0],
            width=c.grid[1],
            heads=c.heads,
            head_dim=c.head_dim,
            window=c.window,
            shift=c.shift,
            scale_rows=len(drawn.scale),
            cosine=int(c.cosine),
            dtype=DTYPES[c.dtype],
            threads=1,
            mask_value=c.mask_value,
            dropout=c.dropout,
        )
        for name, buffer in self.buffers.items():
            setattr(self.args, name, buffer.tensor.data_ptr())

    def give_workspace(self, size: int) -> None:
        """Scratch of `size` bytes, filled with NaN."""
        if size:
            self.buffers["workspace"] = Guarded((-(-size // 4),), torch.float32)
            self.args.workspace = self.buffers["workspace"].tensor.data_ptr()

    def move(self, device: str) -> None:
        """Puts the tensors on another device."""
        for name, buffer in self.buffers.items():
            shape = buffer.tensor.shape
            buffer.whole = buffer.whole.to(device)
            buffer.before = buffer.before.to(device)
            buffer.tensor = buffer.whole[MARGIN : MARGIN + shape.numel()].view(shape)
            setattr(self.args, name, buffer.tensor.data_ptr())

    def results(self) -> dict[str, Tensor]:
        """{"out", "qkv", "scale", ...} as far as they were asked for: output and gradients."""
        names = {"out": "out", **{f"grad_{name}": name for name in GRADIENTS}}
        return {names[k]: b.tensor for k, b in self.buffers.items() if k in names}

    def check_margins(self) -> None:
        """Raises: AssertionError where something was written around a tensor, or an input was
        changed.
        """
        for name, buffer in self.buffers.items():
            if not buffer.intact():
                raise AssertionError(f"written out of bounds around {name}")
            if name in INPUTS and not buffer.unchanged():
                raise AssertionError(f"input {name} was changed")


class Kernel:
    """forward and backward of a library that follows csrc/args.h.

    prefix: "wa_cpu", "wa_cuda" or "wa_emu".
    """

    def __init__(self, library: ctypes.CDLL, prefix: str):
        self.prefix = prefix
        self.device = "cuda" if prefix == "wa_cuda" else "cpu"
        self.functions = {
            name: getattr(library, f"{prefix}_{name}")
            for name in ("forward", "backward", "workspace", "supports")
        }
        self.functions["workspace"].restype = ctypes.c_int64
        self.functions["supports"].restype = ctypes.c_char_p
        self.fault = getattr(library, "wa_emu_fault", None)

    def launch(self, name: str, call: Call) -> None:
        """One forward or backward on the current stream, with scratch of the size the kernel asks
        for.
        """
        size = self.functions["workspace"](ctypes.byref(call.args), int(name == "backward"))
        call.give_workspace(size)
        call.move(self.device)
        arguments = [ctypes.byref(call.args)]
        if self.device == "cuda":
            arguments.append(ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        code = self.functions[name](*arguments)
        if code:
            reason = f": {self.fault().decode()}" if self.fault else ""
            raise KernelError(f"{self.prefix}_{name} returned {code}{reason} ({call.case})")

    def why_not(self, case: Case, **fields) -> str | None:
        """The kernel's own reason why it cannot do the case, or None.

        fields: of the C structure, which no case can have.
        """
        call = Call(Drawn(case))
        for name, value in fields.items():
            setattr(call.args, name, value)
        reason = self.functions["supports"](ctypes.byref(call.args))
        return None if reason is None else reason.decode()

    def run(self, drawn: Drawn, gradients: tuple[str, ...] = GRADIENTS) -> dict[str, Tensor]:
        """{"out", "qkv", "scale", ..., "lse"}: the output, the gradients, the log-sum-exp, on the
        CPU.
        """
        call = Call(drawn, gradients)
        self.launch("forward", call)
        self.launch("backward", call)
        if self.device == "cuda":
            torch.cuda.synchronize()
        call.check_margins()
        found = {**call.results(), "lse": call.buffers["lse"].tensor}
        return {name: t.cpu().clone() for name, t in found.items()}
