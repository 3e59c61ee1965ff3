"""Bugs planted in the tiled kernels: the comparison with float64 finds every one, and passes on the
sources as they are.
"""

import shutil
from pathlib import Path

import pytest

from tests.kernels.emulated import CSRC
from tests.kernels.tiled_kernels import judge

NAMES = ("forward", "queries", "keys", "window", "tile", "pairs", "tables", "epilogue")
FORWARD, QUERIES, KEYS, WINDOW, TILE, PAIRS, TABLES, EPILOGUE = (
    f"cuda/tiled_{name}.h" for name in NAMES
)

# name: (file, what stands there, what a slip would have written)
MUTANTS = {
    "the forward does not wait for its keys": (
        FORWARD,
        "            cp_wait<0>();\n            rows_arrived(",
        "            rows_arrived(",
    ),
    "the forward reads keys that other warps bring": (
        FORWARD,
        "        __syncthreads();\n        for (int pass",
        "        for (int pass",
    ),
    "the forward starts a window before the last is done": (
        FORWARD,
        "__syncthreads();  // the tables are there, the last",
        "// the last",
    ),
    "a window's tokens are read before they are worked out": (
        FORWARD,
        "fill_window<Mode>(shared, p, window);\n        __syncthreads();\n",
        "fill_window<Mode>(shared, p, window);\n",
    ),
    "a block of keys is overwritten while it is read": (
        FORWARD,
        "                if (!p.resident) __syncthreads();\n",
        "",
    ),
    "the two blocks of keys are one": (FORWARD, "first / p.block % 2 * p.block", "0"),
    "output is stored before the warp has written it": (
        FORWARD,
        "__syncwarp();\n            write_rows",
        "write_rows",
    ),
    "the sum keeps its old unit": (FORWARD, "            row_sum[r] *= softmax_rescale;\n", ""),
    "the output keeps its old unit": (
        FORWARD,
        "o[n][2 * r + 1] *= softmax_rescale;",
        "o[n][2 * r + 1] *= 1.f;",
    ),
    "padding is a key": (FORWARD, "if (key & kOutside) x = -INFINITY;", ""),
    "the row sum is taken after dropout": (
        FORWARD,
        "? x[n][e] * p.keep_factor",
        "? x[n][e]",
    ),
    "the shift has the wrong sign": (
        WINDOW,
        "y0 = down * a.window[0] + a.shift[0];",
        "y0 = (down * a.window[0] - a.shift[0] + p.padded[0]) % p.padded[0];",
    ),
    "the second region begins a column late": (
        WINDOW,
        "x >= p.a.window[1] - p.a.shift[1]",
        "x > p.a.window[1] - p.a.shift[1]",
    ),
    "the table's row length is that of the other side": (
        WINDOW,
        "int word = (y * (2 * p.a.window[1] - 1) + x) * bytes;",
        "int word = (y * (2 * p.a.window[0] - 1) + x) * bytes;",
    ),
    "padding is written": (WINDOW, "x >= p.a.width ? -1", "x > p.a.width ? -1"),
    "values are read without the permutation of chunks": (
        TILE,
        "ldsm4t(b, rows + (at.plain ^ n << 5));",
        "ldsm4t(b, rows + (at.lane & 15) * 2 * D + (n * 2 + (at.lane >> 4)) * 16);",
    ),
    "the norm's gradient lacks its second term": (
        TILE,
        "along = reciprocal_norm < 0.99e12f ? along : 0.f;",
        "along = 0.f;",
    ),
    "half a warp skips a shuffle": (
        TILE,
        "    x += __shfl_xor_sync(0xffffffffu, x, 1);",
        "    if (threadIdx.x % 32 < 16) x += __shfl_xor_sync(0xffffffffu, x, 1);",
    ),
    "the mask is forgotten in the backward": (
        PAIRS,
        "masked ? s + mask : s",
        "masked ? s + 0.f * mask : s",
    ),
    "sums of the tables are not cleared": (
        QUERIES,
        "shared.sums[table][i] = make_float4(0.f, 0.f, 0.f, 0.f);",
        ";",
    ),
    "delta leaves out the dropout": (
        QUERIES,
        "x.map[n][e] * x.kept[n][e] * x.grad[n][e];",
        "x.map[n][e] * x.grad[n][e];",
    ),
    "delta of one group alone": (
        QUERIES,
        "for (int other = 0; other < p.groups; ++other)",
        "for (int other = 0; other < 1; ++other)",
    ),
    "dq of one group alone": (
        QUERIES,
        "for (int other = 1; other < p.groups; ++other)",
        "for (int other = 2; other < p.groups; ++other)",
    ),
    "parts of dq overwrite keys that are still read": (
        QUERIES,
        "if (p.resident) __syncthreads();",
        "",
    ),
    "a table's last query is left out": (
        TABLES,
        "i + first >= last) continue;",
        "i + first >= last - 1) continue;",
    ),
    "dq lacks the scale": (
        QUERIES,
        "of_product[e] = of_bias[e] * x.scale[n][e];",
        "of_product[e] = of_bias[e];",
    ),
    "gradients of the post factor ignore the dropout": (
        QUERIES,
        "of_post[e] = keep ?",
        "of_post[e] = keep || e < 4 ?",
    ),
    "dk lacks delta": (
        KEYS,
        "(scaled * x.grad[n][e] - delta)",
        "(scaled * x.grad[n][e] - 0.f * delta)",
    ),
    "the backward's dropout mask is another": (
        KEYS,
        "first_row + i + (e & 1),",
        "first_row + i,",
    ),
    "the keys start a window before the last is done": (
        KEYS,
        "__syncthreads();  // the tables are there, the last",
        "// the last",
    ),
    "dk and dv are stored before the warp has written them": (
        KEYS,
        "__syncwarp();\n            write_rows",
        "write_rows",
    ),
    "values are read before they have arrived": (
        FORWARD,
        "cp_wait<0>();\n                __syncwarp();\n                float ratio",
        "float ratio",
    ),
    "the gradient of the log-sum-exp has the other sign": (
        QUERIES,
        "own.delta[r] -= p.a.grad_lse[own.row[r]];",
        "own.delta[r] += p.a.grad_lse[own.row[r]];",
    ),
    "delta lacks beta": (QUERIES, "own.delta[r] *= p.a.beta[head];", "own.delta[r] *= 1.f;"),
    "a strip's sums are laid where the first one's are": (
        QUERIES,
        "first_query / 16 + own.tile)] = sum;",
        "own.tile)] = sum;",
    ),
    "the gradient of post lacks beta": (QUERIES, "of_post[e] *= beta;", "of_post[e] *= 1.f;"),
    "dk lacks beta": (KEYS, "kept * beta : kept", "kept * (0.f * beta + 1.f) : kept"),
    "a block's rows are excluded by the first one's values": (
        KEYS,
        "shared.token + first,\n",
        "shared.token + 0 * first,\n",
    ),
    "the exclusive ratio is kept a tile too early": (
        FORWARD,
        "p.a.along[first_row + tile * 16 +",
        "p.a.along[first_row +",
    ),
    "the own gradient lacks the result": (EPILOGUE, "by.result * o.x + ", ""),
}


@pytest.fixture
def sources(tmp_path):
    return Path(shutil.copytree(CSRC, tmp_path / "csrc"))


@pytest.mark.slow
def test_the_sources_as_they_are_pass(sources):
    assert judge(sources) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(sources, name):
    file, right, wrong = MUTANTS[name]
    path = sources / file
    text = path.read_text()
    assert right in text, "the sources have changed: plant this bug elsewhere"
    path.write_text(text.replace(right, wrong))
    assert judge(sources) != ""
