"""Bugs planted in the kernels for small windows: small_kernels.py finds every one, and passes on
the sources as they are.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.emulated import CSRC
from tests.kernels.small_kernels import FEW, library

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = (FEW, "-O0")
FORWARD, BACKWARD, GRADIENTS, LAYOUT, REDUCE, EPILOGUE = (
    "cuda/small_" + name + ".h"
    for name in "forward backward gradients layout reduce epilogue".split()
)
BOTH, SUMS = "cuda/epilogue.h", "cuda/epilogue_sums.h"

# name: (file, what stands there, what a slip would have written)
MUTANTS = {
    "the forward does not wait for its copies": (
        FORWARD,
        "cp_wait<0>();\n        __syncthreads();",
        "__syncthreads();",
    ),
    "the forward has no barrier after its copies": (
        FORWARD,
        "__syncthreads();  // all of this window",
        "// all of this window",
    ),
    "the forward copies the next window over this one": (
        FORWARD,
        "shared + (stage ^ 1) * K::STAGE",
        "shared + stage * K::STAGE",
    ),
    "the forward stores its rows before the warp has written them": (
        FORWARD,
        "        __syncwarp();\n#pragma unroll\n        for (int i = 0; i < Copy",
        "#pragma unroll\n        for (int i = 0; i < Copy",
    ),
    "places are read before they are written": (
        FORWARD,
        "place_of(p, thread);\n    __syncthreads();",
        "place_of(p, thread);",
    ),
    "P is packed in the wrong order": (
        FORWARD,
        "pack2<T>(s[2 * i][0], s[2 * i][1])",
        "pack2<T>(s[2 * i][1], s[2 * i][0])",
    ),
    "the row sum is taken after dropout": (
        FORWARD,
        "if (K::EXTRA && (p.a.post || p.threshold)) {",
        "if (false) {",
    ),
    "the largest logit is taken for half as large": (
        LAYOUT,
        "return fmaxf(x, __shfl_xor_sync(ALL, x, 2));",
        "return x * 0.5f;",
    ),
    "half a warp skips a shuffle": (
        LAYOUT,
        "return x + __shfl_xor_sync(ALL, x, 2);",
        "if (threadIdx.x % 32 < 16) return x; return x + __shfl_xor_sync(ALL, x, 2);",
    ),
    "tiles are read without the swizzle": (
        LAYOUT,
        "int sixteen_rows(int lane) { return at<D>(lane % 16, lane / 16); }",
        "int sixteen_rows(int lane) { return lane % 16 * 2 * D + lane / 16 * 16; }",
    ),
    "the shift has the wrong sign": (
        LAYOUT,
        "row * p.a.window[0] + p.a.shift[0];",
        "(row * p.a.window[0] - p.a.shift[0] + p.padded_height) % p.padded_height;",
    ),
    "padding begins a row late": (
        LAYOUT,
        "return y < p.a.height && x < p.a.width ?",
        "return y <= p.a.height && x < p.a.width ?",
    ),
    "padding is a key": (LAYOUT, "if (dead >> bit & 1u) s[n][e] = -INFINITY;", ";"),
    "the table's row length is that of the other side": (
        LAYOUT,
        "y * (2 * p.a.window[1] - 1) + x)",
        "y * (2 * p.a.window[0] - 1) + x)",
    ),
    "the second region begins a row late": (
        LAYOUT,
        "(place_y(place) >= y) << b |",
        "(place_y(place) > y) << b |",
    ),
    "the folded column is the first": (
        LAYOUT,
        "p.a.shift[1] > 0 && column == p.columns - 1",
        "p.a.shift[1] > 0 && column == 0",
    ),
    "the norm leaves out an element": (LAYOUT, "sum += a.x * a.x + a.y * a.y", "sum += a.x * a.x"),
    "the backward does not wait for its copies": (
        BACKWARD,
        "cp_wait<0>();\n        if (K::EPILOGUE",
        "if (K::EPILOGUE",
    ),
    "the backward starts a window before the last is done": (
        BACKWARD,
        "p.a.exclusion[head]);\n        __syncthreads();",
        "p.a.exclusion[head]);",
    ),
    "one warp passes by a barrier": (
        BACKWARD,
        "__syncthreads();  // all rows of P",
        "if (warp > 0) __syncthreads();  // all rows of P",
    ),
    "dk and dv are taken before all rows are there": (
        BACKWARD,
        "__syncthreads();  // all rows of P",
        "// all rows of P",
    ),
    "the next window is laid over rows that other warps still read": (
        BACKWARD,
        "__syncthreads();  // nobody reads other warps' rows",
        "// nobody reads other warps' rows",
    ),
    "gradients are laid over tiles still read": (
        BACKWARD,
        "unsigned char* way_out = v;",
        "unsigned char* way_out = q;",
    ),
    "unit vectors are written over raw ones still read": (
        BACKWARD,
        """__syncthreads();  // all norms are there, and nobody needs the raw q and k any more
            norm[0] = norms[row];
            norm[1] = norms[row + 8];
            if (cosine) normalise<T, D>(q, norms, thread);""",
        """if (cosine) normalise<T, D>(q, norms, thread);
            __syncthreads();
            norm[0] = norms[row];
            norm[1] = norms[row + 8];""",
    ),
    "padding rows read their log-sum-exp": (
        GRADIENTS,
        "query[h] = is_query(p, w, places, row + 8 * h);",
        "query[h] = row + 8 * h < p.tokens;",
    ),
    "a window is stored where the one before it was": (FORWARD, "here[i] = there[i];", ";"),
    "columns without a pair are left as they were": (
        BACKWARD,
        "ds[2 * K::WARPS - 1][1] = 0u;",
        "ds[2 * K::WARPS - 1][1] = 0x7fc07fc0u;",
    ),
    "the backward's dropout mask is another": (
        BACKWARD,
        "(uint64_t)(base + row + e / 2 * 8), key",
        "(uint64_t)(base + row), key",
    ),
    "dropout does not scale the gradient": (
        BACKWARD,
        "g[n][e] *= keep ? p.keep_scale : 0.f;",
        "g[n][e] *= keep ? 1.f : 0.f;",
    ),
    "the gradient of P lacks the factor after the softmax": (
        BACKWARD,
        "g[n][e] *= by[e];",
        "g[n][e] *= 1.f;",
    ),
    "dS lacks the scale": (
        BACKWARD,
        "x[n][2 * h] * by[2 * h], x[n][2 * h + 1] * by[2 * h + 1]",
        "x[n][2 * h], x[n][2 * h + 1]",
    ),
    "sums are read before all threads have put theirs": (
        BACKWARD,
        (
            "        __syncthreads();\n        sum_by_offset<K>(p,"
            " reinterpret_cast<float*>(shared), p.bias"
        ),
        "        sum_by_offset<K>(p, reinterpret_cast<float*>(shared), p.bias",
    ),
    "the sum of one scale forgets a warp": (
        BACKWARD,
        "int i = 0; i < K::WARPS; ++i) sum",
        "int i = 1; i < K::WARPS; ++i) sum",
    ),
    "the gradient through the norm lacks 1 / |x|": (
        GRADIENTS,
        "(g[n][2 * h] - u.x * along) * by",
        "(g[n][2 * h] - u.x * along)",
    ),
    "the gradient through the norm keeps its radial part": (
        GRADIENTS,
        "along = across_quad_sum(along);",
        "along = 0.f;",
    ),
    "a pair is counted for its mirror image": (
        GRADIENTS,
        "const int i = y * width + x, j = i - dy * width - dx;",
        "const int j = y * width + x, i = j - dy * width - dx;",
    ),
    "the reduction leaves out the last block": (
        REDUCE,
        "s < t.splits",
        "s < t.splits - (t.splits > 1)",
    ),
    "the reduction's tree lacks its barrier": (
        REDUCE,
        "        __syncthreads();\n        if (thread < half)",
        "        if (thread < half)",
    ),
    "the gradient of the log-sum-exp has the other sign": (
        BACKWARD,
        "inner[h] = beta * inner[h] - of_lse[h];",
        "inner[h] = beta * inner[h] + of_lse[h];",
    ),
    "padding reads a gradient of the log-sum-exp": (
        BACKWARD,
        "row, 0.f);\n#pragma",
        "row, NAN);\n#pragma",
    ),
    "dS lacks beta": (BACKWARD, "(K::EPILOGUE ? beta * g[n][e] : g[n][e])", "g[n][e]"),
    "the gradient of post lacks beta": (
        BACKWARD,
        "K::EPILOGUE && p.a.beta ? p.a.beta[head] : 1.f);",
        "1.f);",
    ),
    "beta's gradient counts a row for each of its lanes": (
        BACKWARD,
        "sum_of_warp(lane % 4 ? 0.f : inner[0] + inner[1])",
        "sum_of_warp(inner[0] + inner[1])",
    ),
    "rows are excluded before they have arrived": (
        BACKWARD,
        """        cp_wait<0>();
        if (K::EPILOGUE && p.a.exclusion)
            exclude_rows<T, D>(dout, v, rows, p.a.exclusion[head]);
""",
        """        if (K::EPILOGUE && p.a.exclusion)
            exclude_rows<T, D>(dout, v, rows, p.a.exclusion[head]);
        cp_wait<0>();
""",
    ),
    "dv lacks beta": (EPILOGUE, "beta * g[n][2 * h] + alpha", "g[n][2 * h] + alpha"),
    "the exclusive ratio is that of a result not yet normalised": (
        EPILOGUE,
        "across_quad_sum(along) * by[h] /",
        "across_quad_sum(along) /",
    ),
    "the gradient keeps its part along the value": (
        EPILOGUE,
        "dz[j].x - by * own[j].x",
        "dz[j].x",
    ),
    "below the floor the length still has a gradient": (
        BOTH,
        "(length > LENGTH_FLOOR ? 2.f : 0.f)",
        "2.f",
    ),
    "sums of the epilogue are read where another head's are": (
        SUMS,
        "i / tiles * heads + head",
        "i / tiles + head",
    ),
    "the epilogue's tree lacks its barrier": (
        SUMS,
        "        __syncthreads();\n        if (thread < half)",
        "        if (thread < half)",
    ),
}


@pytest.fixture(scope="module")
def verdict():
    """Path of a library -> what became of the probes on it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.small_kernels"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    ) as server:

        def ask(path: Path) -> str:
            print(path, file=server.stdin, flush=True)
            return server.stdout.readline().strip()

        yield ask
        server.stdin.close()


@pytest.mark.slow
def test_the_sources_as_they_are_pass_the_probes(verdict):
    assert verdict(library(*FLAGS)) == "right"


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(verdict, name, tmp_path):
    file, right, wrong = MUTANTS[name]
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("cpu", "*.o"))
    path = tmp_path / "csrc" / file
    text = path.read_text()
    assert right in text, f"{file} has changed: the planted bug no longer fits"
    path.write_text(text.replace(right, wrong, 1))
    words = verdict(library("-Wno-error", *FLAGS, csrc=tmp_path / "csrc"))
    print(f"{name}: {words}")
    assert words.startswith(("wrong: ", "ended by signal")), words
