"""The same network on an NVIDIA GPU: float16, with the cache in the GPU's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from models.errors import ModelError
from models.runtime import Runtime

INSTALL = (
    "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'==1.32.0"
)


def check() -> None:
    """Say what is missing before anything is built for it."""
    found = onnxruntime.get_available_providers()
    if CudaRuntime.provider not in found:
        raise ModelError(
            f'device="cuda": expected onnxruntime with {CudaRuntime.provider}, found '
            f'{", ".join(found)}; install it ({INSTALL}), or use device="cpu"'
        )


class CudaRuntime(Runtime):
    """`Runtime` on the first GPU. Token ids go in and logits come out by the host."""

    device = "cuda"
    provider = "CUDAExecutionProvider"
    precision = "float16"

    def __init__(self, graph: Path, *, rows: int, context: int, threads: int) -> None:
        onnxruntime.preload_dlls()  # CUDA and cuDNN from their wheels, if installed
        super().__init__(graph, rows=rows, context=context, threads=threads)
        if self._session.get_providers()[0] != self.provider:
            raise ModelError(
                f'device="cuda": expected {self.provider} to start, found that it '
                "did not; check that nvidia-smi lists a GPU and that CUDA 12 and "
                f'cuDNN 9 are installed ({INSTALL}), or use device="cpu"'
            )
        self._copier = _row_copier(self._row_shape, len(self._names))

    def _allocate(self, shape: tuple[int, ...]) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, self._float, self.device, 0
        )

    def _address(self, buffer: Any, row: int) -> int:
        row_bytes = int(np.prod(self._row_shape)) * self._float.itemsize
        return buffer.data_ptr() + row * row_bytes

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy a row over another: all of it, which a GPU does in microseconds."""
        binding = self._copier.io_binding()
        for place, buffer in enumerate(self._cache):
            where = (self.device, 0, self._float, self._row_shape)
            binding.bind_input(f"from_{place}", *where, self._address(buffer, source))
            binding.bind_output(f"to_{place}", *where, self._address(buffer, target))
        self._copier.run_with_iobinding(binding)


def _row_copier(shape: tuple[int, ...], count: int) -> onnxruntime.InferenceSession:
    """A graph that copies `count` tensors: onnxruntime offers no plain copy."""
    from onnx import TensorProto, helper

    def value(name: str):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)

    names = [(f"from_{place}", f"to_{place}") for place in range(count)]
    graph = helper.make_graph(
        [helper.make_node("Identity", [start], [end]) for start, end in names],
        "copy_row",
        [value(start) for start, _ in names],
        [value(end) for _, end in names],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=[CudaRuntime.provider]
    )
