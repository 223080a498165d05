"""Triton's kernels compile to machine code of a Hopper GPU, which needs none: what the interpreter does not check."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from model.kernels import dropout, lrn, lrn_pool, sgd
from pipeline.resident import kernels as resident

def compiled(kernel, types, **constants):
    signature = dict(types) | dict.fromkeys(constants, "constexpr")
    aligned = [["tt.divisibility", 16]]  # memory that torch allocates
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names},
                       {(kernel.arg_names.index(name),): value for name, value in constants.items()},
                       {(kernel.arg_names.index(name),): aligned for name in types if types[name].startswith("*")})
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert found.asm["cubin"] and found.metadata.shared == 0, kernel  # lanes exchange nothing
    print(kernel.__name__, found.asm["ptx"].count("fma.rn.f32"))

half, single, number = "*bf16", "*fp32", "i32"
compiled(sgd._update, dict(w_ptr=single, v_ptr=single, g_ptr=single, rate_ptr=single, decay_ptr=single,
                           hold_ptr="*u8", count=number), MOMENTUM=0.9, SIZE=sgd.SIZE)
compiled(dropout._forward, dict(x_ptr=half, y_ptr=half, words_ptr="*i32", rows=number, columns=number, first_row=number,
                                first_column=number), THRESHOLD=0, SCALE=2.0, R=dropout.R, C=dropout.C)
compiled(dropout._backward, dict(y_ptr=half, g_ptr=half, dx_ptr=half, count=number), SCALE=2.0, SIZE=2048)
constants = dict(K=2.0, ALPHA=1e-4, BETA=0.75, WINDOW=5, RELU=True, FLOAT=triton.language.float32, N=48, C=8, L=lrn.LANES,
                 LAST=True)
compiled(lrn._forward, dict(x_ptr=half, y_ptr=half, lanes=number, shift=number), **constants)
compiled(lrn._backward, dict(x_ptr=half, g_ptr=half, dx_ptr=half, lanes=number, shift=number), **constants)
del constants["LAST"]
types = dict.fromkeys(("lanes", "h", "w", "p", "q"), number) | dict(x_ptr=half, k_ptr="*u8")
compiled(lrn_pool._forward, types | dict(y_ptr=half, rows=number), ALL=96, PX=3, STRIDE=2, J=2, **constants)
compiled(lrn_pool._backward, types | dict(g_ptr=half, dx_ptr=half), ALL=96, PX=3, STRIDE=2, **constants)
types = dict(light="*u8", chroma="*u8", table="*i32", mean=single)
types |= {name: number for name in resident._images.arg_names if name == "B" or "_" in name}
for yuv, packed, mean, centered, out in ((False, False, True, False, half), (True, False, True, False, half),
                                         (True, True, True, True, single), (False, True, False, False, "*fp16")):
    compiled(resident._images, types | dict(out=out), S=256, C=227, K=116, YUV=yuv, PACKED=packed, MEAN=mean,
             CENTERED=centered, LINES=4, WIDTH=256)
"""


def test_kernels_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)  # a process of its own: Triton reads it when it is imported
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=Path(__file__).resolve().parents[2], env=environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = dict(line.split() for line in done.stdout.splitlines())
    assert counted.keys() == {"_update", "_forward", "_backward", "_images"} and counted["_images"] == "0"
    # Two roundings a weight, as torch's: a product that fuses with nothing, two fused ones.
    assert done.stdout.splitlines()[0] == f"_update {2 * 1024 // 128}"
