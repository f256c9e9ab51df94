"""The shapes of DeepSeek-V3, once, with the work that each stands for. 4096 tokens are one sequence of pre-training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gemm:
    """y (m, n) = x (m, k) @ w (n, k)^T."""

    m: int
    n: int
    k: int
    role: str = ""

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class GroupedGemm:
    """`groups` products, `rows` tokens each: the rows of x in a forward pass, the contraction in a weight gradient."""

    groups: int
    rows: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.groups}groups_{self.rows}x{self.n}x{self.k}"

    @property
    def flops(self) -> int:
        return 2 * self.groups * self.rows * self.n * self.k


@dataclass(frozen=True)
class Matrix:
    """rows x columns, to be quantised or normalised."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.rows, self.columns

    def quantize_bytes(self, *, element_bytes: int = 2, with_transpose: bool = False) -> int:
        """Least traffic of a 1x128 quantisation: read once, write FP8 and FP32 scales, once or in both layouts."""
        return element_bytes * self.rows * self.columns + self.quantized_bytes * (2 if with_transpose else 1)

    @property
    def quantized_bytes(self) -> int:
        """FP8 and the FP32 scales of its 1x128 tiles."""
        elements = self.rows * self.columns
        return elements + 4 * (elements // 128)

    @property
    def bf16_bytes(self) -> int:
        return 2 * self.rows * self.columns

    def quantize_blocks_bytes(self, *, element_bytes: int, with_transpose: bool) -> int:
        """Least traffic of a 128x128 quantisation, whose scales are few enough to leave out."""
        return self.rows * self.columns * (element_bytes + (2 if with_transpose else 1))

    def swiglu_bytes(self, *, fp8: bool, with_transpose: bool) -> int:
        """Least traffic of SwiGLU with its cast; columns are those of the product."""
        read = 2 * (self.quantized_bytes if fp8 else 2 * self.rows * self.columns)
        return read + self.quantized_bytes * (2 if with_transpose else 1)

    def swiglu_backward_bytes(self, *, fp8: bool, with_product: bool) -> int:
        """Least traffic of its backward pass: gate, up and a BF16 gradient in, two gradients out in two layouts."""
        read = 2 * (self.quantized_bytes if fp8 else 2 * self.rows * self.columns) + 2 * self.rows * self.columns
        return read + self.quantized_bytes * (5 if with_product else 4)


@dataclass(frozen=True)
class Batch:
    """So many matrices of rows x columns."""

    count: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.count}x{self.rows}x{self.columns}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.count, self.rows, self.columns


@dataclass(frozen=True)
class Attention:
    """Causal MLA over one sequence, qk 192 = 128 + 64 rope, v 128. FLOPs are counted causal: half of the square."""

    length: int
    heads: int = 128
    qk_dim: int = 192
    v_dim: int = 128

    def __str__(self) -> str:
        return f"{self.length}tokens_{self.heads}heads"

    @property
    def forward_flops(self) -> int:
        return self.heads * self.length**2 * (self.qk_dim + self.v_dim)

    @property
    def backward_flops(self) -> int:
        return self.heads * self.length**2 * (3 * self.qk_dim + 2 * self.v_dim)


@dataclass(frozen=True)
class Decode:
    """Absorbed MLA decoding: query and key 576 wide, value 512, BF16. `varying`: lengths spread around `length`."""

    batch: int
    queries: int
    length: int
    heads: int
    varying: bool = False

    def __str__(self) -> str:
        about = "about" if self.varying else ""
        return f"{self.batch}x{self.queries}queries_{about}{self.length}cached_{self.heads}heads"

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.queries * self.heads * self.length * (576 + 512)

    @property
    def num_bytes(self) -> int:
        cache = self.batch * self.length * 576
        query_and_output = self.batch * self.queries * self.heads * (576 + 512)
        return 2 * (cache + query_and_output)


@dataclass(frozen=True)
class Routing:
    """Tokens of width `dim`, each to `top_k` of `experts`."""

    tokens: int = 4096
    dim: int = 7168
    experts: int = 256
    top_k: int = 8

    def __str__(self) -> str:
        return f"{self.tokens}x{self.dim}_{self.top_k}of{self.experts}"


TOKENS = 4096

# The thirteen rows that the FP8 GEMM is judged by: each linear layer forward, and each one's input gradient where its
# shape is another.
GEMMS = (
    Gemm(TOKENS, 2112, 7168, "query and KV latents"),
    Gemm(TOKENS, 24576, 1536, "queries from their latent"),
    Gemm(TOKENS, 32768, 512, "keys and values from their latent"),
    Gemm(TOKENS, 7168, 16384, "attention output"),
    Gemm(TOKENS, 4096, 7168, "expert gate and up"),
    Gemm(TOKENS, 7168, 2048, "expert down"),
    Gemm(TOKENS, 36864, 7168, "dense gate and up"),
    Gemm(TOKENS, 7168, 18432, "dense down"),
    Gemm(TOKENS, 1536, 24576, "gradient of the query latent"),
    Gemm(TOKENS, 512, 32768, "gradient of the KV latent"),
    Gemm(TOKENS, 16384, 7168, "gradient of the attention output"),
    Gemm(TOKENS, 7168, 4096, "gradient of expert gate and up"),
    Gemm(TOKENS, 2048, 7168, "gradient of expert down"),
)

SMALL_GEMMS = (
    Gemm(64, 7168, 16384, "attention output, decoding"),
    Gemm(128, 7168, 2048, "expert down, decoding"),
)

# Weight gradients: m and n are the weight's, k the tokens; FP32, added in place.
WEIGHT_GRADIENTS = (
    Gemm(7168, 16384, TOKENS, "attention output"),
    Gemm(4096, 7168, TOKENS, "expert gate and up"),
    Gemm(24576, 1536, TOKENS, "queries from their latent"),
    Gemm(2112, 7168, TOKENS, "query and KV latents"),
    Gemm(36864, 7168, TOKENS, "dense gate and up"),
)

M_GROUPED_GEMMS = (
    GroupedGemm(4, 8192, 4096, 7168),
    GroupedGemm(4, 8192, 7168, 2048),
    GroupedGemm(8, 4096, 4096, 7168),
)

MASKED_GEMMS = (
    GroupedGemm(32, 192, 4096, 7168),
    GroupedGemm(32, 192, 7168, 2048),
)

# Expert weight gradients: `rows` tokens of each expert are the contraction.
K_GROUPED_GEMMS = (
    GroupedGemm(4, 8992, 4096, 7168),
    GroupedGemm(4, 8224, 7168, 2048),
)

# What is quantised on the way through a layer: the inputs of its linear layers and the gradients of their outputs, of
# one sequence and of four.
ACTIVATIONS = tuple(Matrix(rows, columns) for rows in (TOKENS, 4 * TOKENS) for columns in (2048, 7168, 18432))

WEIGHTS = (Matrix(7168, 16384), Matrix(4096, 7168), Matrix(7168, 2048), Matrix(36864, 7168))
EXPERTS = Batch(16, 4096, 7168)  # gate and up

ATTENTIONS = (Attention(4096), Attention(8192), Attention(16384), Attention(32768))

# Documents packed into two sequences of pre-training.
RAGGED_ATTENTION = (Attention(4001), Attention(17), Attention(1111), Attention(3063))
# Products of gate and up: an expert's, the dense layers', and four or eight experts' together.
PRODUCTS = (Matrix(TOKENS, 2048), Matrix(TOKENS, 18432), Matrix(4 * TOKENS, 2048), Matrix(8 * TOKENS, 2048))


DECODES = (
    Decode(128, 1, 4096, 128),
    Decode(128, 1, 16384, 128),
    Decode(128, 2, 4096, 128),
    Decode(128, 2, 16384, 128),
    Decode(128, 1, 16384, 16),
    Decode(128, 1, 8192, 16, varying=True),
)

ROUTINGS = (Routing(),)

# What is normed: the residual stream, and the latents of queries, and of keys and values.
NORMS = tuple(Matrix(rows, columns) for columns in (7168, 1536, 512) for rows in (TOKENS, 4 * TOKENS))
