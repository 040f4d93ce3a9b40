"""Networks on a CPU through OpenVINO: the same function, compiled for the processor it runs on."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathopipe.errors import EncoderError

__all__ = ["CompiledNetwork", "require_openvino"]


def require_openvino() -> Any:
    """The package.

    Raises:
        EncoderError: It is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise EncoderError(
            "embed.engine=openvino needs OpenVINO: pip install 'pathopipe[openvino]', or use embed.engine=torch"
        ) from None
    return openvino


class CompiledNetwork:
    """A network of torch, compiled when the first batch of a size in pixels comes; batches may differ in length.

    Args:
        model: In fp32, on the CPU, ready to compute; it is not changed.
        name: Of the encoder, for messages.
        bf16: Compute in bf16 instead of fp32.
        threads: How many it computes with.
    """

    def __init__(self, model: nn.Module, *, name: str, bf16: bool, threads: int) -> None:
        self._openvino = require_openvino()
        self._model = model
        self._name = name
        self._settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        self._compiled: dict[tuple[int, int], Any] = {}

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, 3, height, width) float32 -> (n, features) float32.

        Raises:
            EncoderError: The network holds an operation that OpenVINO can't take over.
        """
        pixels = batch.contiguous()
        size = (pixels.shape[2], pixels.shape[3])
        if size not in self._compiled:
            self._compiled[size] = self._compile(pixels)
        # The array belongs to the compiled network and is written to again by the next batch.
        return torch.from_numpy(np.array(self._compiled[size](pixels.numpy())[0]))

    def _compile(self, pixels: Tensor) -> Any:
        shape = [-1, *pixels.shape[1:]]
        try:
            # Traced outside of inference mode, whose tensors can't be recorded; two tiles, so that no axis looks fixed.
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                converted = self._openvino.convert_model(
                    self._model, example_input=torch.zeros(2, *pixels.shape[1:]), input=shape
                )
            return self._openvino.Core().compile_model(converted, "CPU", self._settings)
        except Exception as error:  # tracing and the converter raise whatever the network's code does
            reason = " ".join(str(error).split())[:200]
            raise EncoderError(
                f"{self._name}: OpenVINO can't take the network over ({type(error).__name__}: {reason}); "
                "use embed.engine=torch"
            ) from error
