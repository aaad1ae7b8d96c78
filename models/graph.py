"""The network as an ONNX graph, made of onnxruntime's stock kernels.

Three precisions of the same weights, one builder:

    int4     the default on CPU: 4-bit matrices, 8-bit embedding, float32 activations
    float16  for CUDA: dense float16 matrices and activations
    float32  the reference that the tests compare the others with

How Q4_1 becomes exact enough. A Q4_1 block holds 32 weights w = d*q + m, with q in
0..15. onnxruntime's 4-bit kernel computes d*(q - z) with an *integer* zero point z, so
rounding z = -m/d leaves an error e = m + d*z of up to d/2, the same for all 32 weights
of the block. Left alone it ruins the model (perplexity 13 becomes 17 or worse). But its
effect on the output is only e times the *sum of the 32 inputs*. So we append those sums
to the input, and e as further columns to the weights:

    y = [x, blocksums(x)] @ [d*(q - z), e] transposed

One matrix, one kernel call. e is 4-bit itself, which leaves errors of at most d/28.
Adding blocksums(x) @ e in float32 beside the kernel is a little more exact (KL
0.0050 instead of 0.0064 against float32) and a quarter slower for a single row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

    from models.weights import Blocks, Weights

LAYERS = 30
HIDDEN = 576
QUERY_HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64
FEED_FORWARD = 1536
VOCABULARY = 49_152
MAX_CONTEXT = 8_192  # tokens the model was trained for
BLOCK = 32  # weights that share one scale, in both of GGUF's formats used here
ROPE_BASE = 100_000.0
EPSILON = 1e-5  # of the RMS norms
PRECISIONS = ("int4", "float16", "float32")
CONTRIB = "com.microsoft"  # onnxruntime's own operators


def build(weights: Weights, precision: str = "int4") -> ModelProto:
    """The whole graph.

    Inputs: `ids` int64 [rows, tokens]; `lengths` int32 [rows], tokens in the cache
    after this call, less one; `longest` int32, the largest length plus one; `picked`
    int64 [n], the flat positions whose logits are wanted; and for each layer l
    `past_key_l`, `past_value_l` [rows, 3, context, 64]. Outputs: `logits` [n, 49152],
    and `key_l`, `value_l`, which may share their memory with the inputs.
    """
    graph = _Graph(precision)
    hidden = graph.embedding(weights.matrix("token_embd.weight"))
    graph.rotary_tables()
    update = None
    for layer in range(LAYERS):
        hidden, update = _layer(graph, weights, layer, hidden, update)
    _, last = graph.norm(hidden, update, weights.vector("output_norm.weight"))
    graph.head(last, weights.matrix("token_embd.weight"))
    return graph.finish()


def _layer(
    graph: _Graph, weights: Weights, layer: int, hidden: str, update: str | None
) -> tuple[str, str]:
    """Attention and feed-forward; returns the residual stream and what to add to it."""

    def matrix(*names: str) -> Blocks:
        blocks = weights.matrix(f"blk.{layer}.{names[0]}.weight")
        for name in names[1:]:
            blocks = weights.matrix(f"blk.{layer}.{name}.weight").stacked_on(blocks)
        return blocks

    def vector(name: str) -> np.ndarray:
        return weights.vector(f"blk.{layer}.{name}.weight")

    # Matrices that read the same input are one matrix: fewer, larger kernel calls.
    hidden, x = graph.norm(hidden, update, vector("attn_norm"))
    x = graph.linear(x, matrix("attn_q", "attn_k", "attn_v"))
    x = graph.attention(x, layer)
    x = graph.linear(x, matrix("attn_output"))
    hidden, x = graph.norm(hidden, x, vector("ffn_norm"))
    x = graph.linear(x, matrix("ffn_gate", "ffn_up"))
    gate, up = graph.add_many("Split", x, outputs=2, axis=-1, num_outputs=2)
    gate = graph.add("QuickGelu", gate, domain=CONTRIB, alpha=1.0)  # x * sigmoid(x)
    x = graph.linear(graph.add("Mul", gate, up), matrix("ffn_down"))
    return hidden, x


class _Graph:
    """Collects nodes and constants; each method appends one idea."""

    def __init__(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}, "
                f"found {precision!r}; choose one of them"
            )
        self.precision = precision
        self.float = np.float16 if precision == "float16" else np.float32
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        for name, type, shape in (
            ("ids", np.int64, ["rows", "tokens"]),
            ("lengths", np.int32, ["rows"]),
            ("longest", np.int32, []),
            ("picked", np.int64, ["n"]),
        ):
            self.inputs.append(_value(name, type, shape))
        self.outputs.append(_value("logits", self.float, ["n", VOCABULARY]))

    def constant(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(
                np.ascontiguousarray(array), name
            )
        return name

    def add(self, operator: str, *inputs: str, **settings) -> str:
        """Append one node; returns the name of its output."""
        return self.add_many(operator, *inputs, outputs=1, **settings)[0]

    def add_many(
        self, operator: str, *inputs: str, outputs: int, domain: str = "", **settings
    ) -> list[str]:
        """Append one node with several outputs; returns their names."""
        from onnx import helper

        label = f"{operator}_{len(self.nodes)}"
        names = [f"{label}_{place}" for place in range(outputs)]
        node = helper.make_node(
            operator, inputs, names, name=label, domain=domain, **settings
        )
        self.nodes.append(node)
        return names

    def embedding(self, table: Blocks) -> str:
        if self.precision != "int4":
            dense = self.constant("embedding", table.dense().astype(self.float))
            return self.add("Gather", dense, "ids")
        # The same bytes serve the head, whose kernel wants them unsigned.
        codes, scale = self._embedding_codes(table)
        codes = self.add("Cast", self.add("Gather", codes, "ids"), to=1)  # float32
        centred = self.add(
            "Sub", codes, self.constant("128", np.array(128, np.float32))
        )
        scale = self.add("Gather", scale, "ids")
        last = self.constant("last", np.array([-1]))
        scaled = self.add("Mul", centred, self.add("Unsqueeze", scale, last))
        shape = self.constant("shape_hidden", np.array([0, 0, HIDDEN]))
        return self.add("Reshape", scaled, shape)

    def _embedding_codes(self, table: Blocks) -> tuple[str, str]:
        codes = (table.codes.astype(np.int16) + 128).astype(np.uint8)
        return (
            self.constant("embedding", codes),
            self.constant("embedding_scale", table.scale),
        )

    def rotary_tables(self) -> None:
        powers = np.arange(0, HEAD_SIZE, 2) / HEAD_SIZE
        angles = np.arange(MAX_CONTEXT)[:, None] / ROPE_BASE**powers
        self.constant("cos", np.cos(angles).astype(self.float))
        self.constant("sin", np.sin(angles).astype(self.float))

    def norm(
        self, hidden: str, update: str | None, weight: np.ndarray
    ) -> tuple[str, str]:
        """Add `update` to the residual stream; returns the sum and its RMS norm."""
        scale = self.constant(f"norm_{len(self.nodes)}", weight.astype(self.float))
        if update is None:
            x = self.add(
                "SimplifiedLayerNormalization",
                *(hidden, scale),
                epsilon=EPSILON,
                axis=-1,
            )
            return hidden, x
        x, _, _, total = self.add_many(
            "SkipSimplifiedLayerNormalization",
            *(hidden, update, scale),
            outputs=4,
            domain=CONTRIB,
            epsilon=EPSILON,
        )
        self.nodes[-1].output[1:3] = ["", ""]  # statistics that nobody reads
        return total, x

    def linear(self, x: str, blocks: Blocks) -> str:
        name = f"matrix_{len(self.nodes)}"
        if self.precision != "int4":
            dense = blocks.dense().astype(self.float)
            return self.add("MatMul", x, self.constant(name, dense.T))
        codes, scale, zero = _four_bit(blocks)
        count = blocks.inputs // BLOCK
        shape = self.constant(f"shape_{count}", np.array([0, 0, count, BLOCK]))
        axis = self.constant("axis_3", np.array([3]))
        sums = self.add("ReduceSum", self.add("Reshape", x, shape), axis, keepdims=0)
        return self.add(
            "MatMulNBits",
            self.add("Concat", x, sums, axis=-1),
            self.constant(f"{name}_codes", codes),
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", zero),
            domain=CONTRIB,
            K=blocks.inputs + count,
            N=blocks.outputs,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,  # activations become 8-bit, as llama.cpp does it too
        )

    def attention(self, x: str, layer: int) -> str:
        """Grouped-query attention over the cache, rotary embedding included."""
        shape = ["rows", KV_HEADS, "context", HEAD_SIZE]
        for kind in ("key", "value"):
            name = f"{kind}_{layer}"
            self.inputs.append(_value(f"past_{name}", self.float, shape))
            self.outputs.append(_value(name, self.float, shape))
        x, *_ = self.add_many(
            "GroupQueryAttention",
            *(x, "", "", f"past_key_{layer}", f"past_value_{layer}"),
            *("lengths", "longest", "cos", "sin"),
            outputs=3,
            domain=CONTRIB,
            num_heads=QUERY_HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            rotary_interleaved=1,  # GGUF files of llama models have Q and K permuted
        )
        self.nodes[-1].output[1:] = [f"key_{layer}", f"value_{layer}"]
        return x

    def head(self, x: str, table: Blocks) -> None:
        """Logits of the picked positions alone: this matrix is a fifth of the model."""
        shape = self.constant("shape_flat", np.array([-1, HIDDEN]))
        x = self.add("Gather", self.add("Reshape", x, shape), "picked", axis=0)
        if self.precision != "int4":
            dense = self.constant("head", table.dense().astype(self.float).T)
            self.add("MatMul", x, dense)
        else:
            codes, _ = self._embedding_codes(table)
            scale = self.constant("head_scale", table.scale.reshape(-1))
            self.add(
                "MatMulNBits",
                *(x, codes, scale),
                domain=CONTRIB,
                K=HIDDEN,
                N=VOCABULARY,
                bits=8,
                block_size=BLOCK,
                accuracy_level=4,
            )
        self.nodes[-1].output[0] = "logits"

    def finish(self) -> ModelProto:
        from onnx import helper

        graph = helper.make_graph(
            self.nodes,
            f"smollm2-135m-instruct-{self.precision}",
            self.inputs,
            self.outputs,
            list(self.constants.values()),
        )
        versions = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10)


def _four_bit(blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points of [d*(q - z), e], as MatMulNBits wants them."""
    d, m = blocks.scale, blocks.minimum
    safe = np.where(d == 0, 1, d)
    zero = np.clip(np.round(-m / safe), 0, 15)
    error = m + d * zero  # [outputs, blocks]

    # The columns of e, in blocks of their own, symmetric around the zero point 8.
    outputs, count = error.shape
    extra = -(-count // BLOCK)
    padded = np.zeros((outputs, extra, BLOCK), np.float32)
    padded.reshape(outputs, -1)[:, :count] = error
    scale = np.maximum(padded.max(-1) / 7, -padded.min(-1) / 8)
    scale[scale == 0] = 1
    codes = np.clip(np.round(padded / scale[..., None] + 8), 0, 15)

    all_codes = np.concatenate([blocks.codes, codes.astype(np.uint8)], axis=1)
    all_scales = np.concatenate([d, scale], axis=1).astype(np.float32)
    zeros = np.concatenate([zero, np.full_like(scale, 8)], axis=1).astype(np.uint8)
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return _halves(all_codes), all_scales.reshape(-1), _halves(zeros).reshape(-1)


def _halves(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte, the first in the low half."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def _value(name: str, type: type, shape: list) -> ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(type)), shape
    )
