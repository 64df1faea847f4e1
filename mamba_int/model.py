"""``MambaInt``: the native model. Its forward runs the integer graph on constants that are being learned.

Latent real parameters become integers through straight-through quantizers; everything after that *is* the
graph of ``mamba_int.native``, executed by ``mamba_int.executor``. So in eval mode the float32 forward
computes the integer model bit for bit, and ``quantize`` loses nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mamba_int.config import MambaIntConfig
from mamba_int.executor import Values, execute_nodes, execute_plan
from mamba_int.native import (
    BIAS_LIMIT,
    MAX_FRAC,
    BC_frac_range,
    NativeNodes,
    activation_names,
    build_nodes,
    largest_y_frac,
    weight_names,
)
from triton_kernels.clamp import saturate
from triton_kernels.straight_through import straight_through
from triton_kernels.ternarize import ternarize

SCALE_MEMORY = 0.98
"""Decay of the running mean square behind a static activation scale."""
OBSERVED_TOKENS = 1024
"""Where runs of nodes are fused, the static scales are estimated on so many steps of a batch."""
SCALE_SIGMAS = 4.0
"""An activation saturates at this many root mean squares."""


def quantize_parameter(real: Tensor, frac: int, limit: int) -> Tensor:
    """round(real * 2^frac) clamped to +-limit, as floats; gradient of the product, straight-through."""
    if real.is_cuda:
        from triton_kernels.quantize_parameter import quantize_parameter_fused

        return quantize_parameter_fused(real, frac, limit)
    smooth = real * 2.0**frac
    return saturate(straight_through(smooth, torch.floor(smooth + 0.5)), -limit, limit)


class MambaInt(nn.Module):
    """The native integer Mamba: classification or language model.

    Args:
        config: shape, forms, bit budget.
        seed: of the initial weights.

    In training mode with scales not yet frozen, every forward updates the running estimates behind the
    static power-of-two scales. Call :meth:`observe` once before the first step.
    """

    statistics: Tensor
    fracs: Tensor
    frozen: Tensor
    gradient_checkpointing: bool = False
    """Whether the inside of every layer is computed anew in the backward pass instead of kept."""
    observing: bool = True
    """Whether forwards update the estimates behind the scales."""

    def __init__(self, config: MambaIntConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = c = config
        random = torch.Generator().manual_seed(seed)
        E, N, H = c.d_inner, c.d_state, c.n_heads

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=random) * std)

        parameters: dict[str, nn.Parameter] = {}
        if c.task == "classification":
            parameters["embed.weight"] = normal(c.d_model, c.n_features, std=0.5)
            parameters["embed.bias"] = nn.Parameter(torch.zeros(c.d_model))
        else:
            parameters["residual.table"] = normal(c.vocab_size, c.d_model, std=1.0)
        projected = 2 * E + 2 * N + H
        for i in range(c.n_layer):
            at = f"layer{i}."
            parameters[at + "in_proj.weight"] = normal(projected, c.d_model, std=c.d_model**-0.5)
            parameters[at + "decay_bias"] = nn.Parameter(
                1 - torch.exp(torch.linspace(math.log(c.decay_max), math.log(c.decay_min), H))
            )
            for name, channels in (("conv_x", E), ("conv_BC", 2 * N)):
                taps = normal(channels, c.d_conv, std=0.3)
                taps.data[:, -1] += 0.7
                parameters[at + name + ".taps"] = taps
                if c.conv_bias:
                    parameters[at + name + ".bias"] = nn.Parameter(torch.zeros(channels))
            angles = torch.exp(torch.linspace(math.log(0.02), math.log(1.5), N // 2))
            if c.rotation != "none":
                # Dyadic-Cayley: the angle is learned as tau = tan(omega / 2).
                parameters[at + "tau"] = nn.Parameter(torch.tan(angles / 2))
            parameters[at + "ssd.D"] = nn.Parameter(torch.ones(H))
            parameters[at + "out_proj.weight"] = normal(c.d_model, E, std=E**-0.5)
        parameters["logits.weight"] = normal(c.n_outputs, c.d_model, std=0.1)
        parameters["logits.bias"] = nn.Parameter(torch.zeros(c.n_outputs))
        # ParameterDict refuses dots in names.
        self.latent = nn.ParameterDict({name.replace(".", "/"): value for name, value in parameters.items()})

        self._read: dict[str, tuple[Tensor, int, Any]] = {}
        self.fused: bool | None = None
        """Whether fused kernels run the graph; None: on a GPU."""
        self._BC_range = BC_frac_range(config)
        self.weight_scales = weight_names(config)
        self.activation_scales = activation_names(config)
        names = len(self.weight_scales) + len(self.activation_scales)
        self.register_buffer("statistics", torch.full((names,), -1.0))
        self.register_buffer("fracs", torch.full((names,), 5, dtype=torch.int64))
        self.register_buffer("frozen", torch.tensor(False))
        self._observe_weights()

    def parameter(self, name: str) -> Tensor:
        """The latent real parameter ``node.constant``."""
        parameter: Tensor = self.latent[name.replace(".", "/")]
        return parameter

    @property
    def exact(self) -> bool:
        """Whether the forward computes integers; False for the float twin."""
        return self.config.arithmetic == "integer"

    @property
    def scales_frozen(self) -> bool:
        """Whether the static scales are final."""
        return bool(self._on_host("frozen"))

    def scales(self) -> dict[str, int]:
        """Binary places of every static scale, by name."""
        names = [*self.weight_scales, *self.activation_scales]
        return dict(zip(names, self._on_host("fracs"), strict=True))

    def _on_host(self, name: str) -> Any:
        """What a buffer holds, read anew only after it was written: reading waits for all work of a GPU."""
        buffer: Tensor = getattr(self, name)
        known = self._read.get(name)
        if known is None or known[0] is not buffer or known[1] != buffer._version:
            known = self._read[name] = buffer, buffer._version, buffer.tolist()
        return known[2]

    def parameter_roles(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter once: ``matrices`` (projections), ``embeddings``, ``decays``, ``small`` ones."""
        roles: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "decays": [], "small": []}
        owners = {"weight": "matrices", "table": "embeddings", "decay_bias": "decays"}
        for name, parameter in self.latent.items():
            roles[owners.get(name.rsplit("/", 1)[-1], "small")].append(parameter)
        return roles

    def _weight_form(self, owner: str) -> str:
        """``ternary`` or ``int8``: the form of the matrix of node ``owner``."""
        if owner == "logits":
            return "int8"
        return self.config.input_weights if owner == "embed" else self.config.weights

    # -- constants ---------------------------------------------------------------------------------------

    def constant(self, name: str, frac: int) -> Tensor:
        """The integers of constant ``node.constant`` at ``frac`` binary places, with gradients.

        The float twin gets the unrounded values on the same scale.
        """
        owner, key = name.rsplit(".", 1)
        layer = owner.split(".")[0]
        if key == "weight":
            weight = self.parameter(name)
            form = self._weight_form(owner)
            if not self.exact:
                return weight * 2.0**frac
            if form == "int8":
                return quantize_parameter(weight, frac, 127)
            if weight.is_cuda:
                from triton_kernels.ternarize_rows import ternarize_rows

                return ternarize_rows(weight, frac)
            return ternarize(weight, frac)
        if key == "sign":
            return torch.sign(torch.cos(self._angles(layer, owner)).detach() + 1e-30)
        if key == "value":
            # literals of the forms: 4 of squareplus, 2 of hard-SiLU, -1, and the ones of the algebraic gate
            last = owner.rsplit(".", 1)[-1]
            literal = {"x_square4": 4.0, "z_plus2": 2.0, "minus_z": -1.0, "divisor": 1.0, "g_acc": 1.0}[last]
            return self.parameter("logits.bias").new_full((), literal * 2.0**frac)
        real, limit = self._real(name, owner, key, layer)
        return quantize_parameter(real, frac, limit) if self.exact else real * 2.0**frac

    def _real(self, name: str, owner: str, key: str, layer: str) -> tuple[Tensor, int]:
        """The real value of a constant and the limit of its integers."""
        c = self.config
        if owner.endswith("in_proj"):
            dt = self.parameter(f"{layer}.decay_bias") * 2.0**-c.dt_gain
            gate = dt.new_full((c.d_inner,), 0.5 if c.gate == "hard_sigmoid" else 0.0)
            middle = dt.new_zeros(c.d_inner + 2 * c.d_state)
            return torch.cat([gate, middle, dt]), 1 << 13
        if key in ("cos", "sin", "cos_Q", "sin_Q", "lam", "gam"):
            return self._rotation(owner, key, layer), 1 << 12
        limits = {"taps": 127, "D": 127, "table": (1 << 11) - 1, "bias": BIAS_LIMIT}
        return self.parameter(name), limits[key]

    def _angles(self, layer: str, owner: str) -> Tensor:
        """Angles [period, N/2] of a ``rotate`` node: -j w for B^ and C^, (Q - j) w for B'."""
        c = self.config
        omega = 2 * torch.atan(self.parameter(f"{layer}.tau"))
        offset = torch.arange(c.chunk_size, device=omega.device, dtype=omega.dtype)[:, None]
        return (c.chunk_size - offset if owner.endswith("B_next") else -offset) * omega

    def _rotation(self, owner: str, key: str, layer: str) -> Tensor:
        c = self.config
        if key in ("cos_Q", "sin_Q"):
            if c.rotation == "none":
                one = 1.0 if key == "cos_Q" else 0.0
                return self.parameter("logits.bias").new_full((c.d_state // 2,), one)
            whole = 2 * torch.atan(self.parameter(f"{layer}.tau")) * c.chunk_size
            return torch.cos(whole) if key == "cos_Q" else torch.sin(whole)
        angles = self._angles(layer, owner)
        if key in ("cos", "sin"):
            return torch.cos(angles) if key == "cos" else torch.sin(angles)
        # Shear steps serve angles in [-pi/2, pi/2]; the half turn beyond is the node's sign.
        folded = torch.atan(torch.tan(angles))
        return -torch.tan(folded / 2) if key == "lam" else torch.sin(folded)

    # -- scales ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _observe_weights(self) -> None:
        for i, name in enumerate(self.weight_scales):
            weight = self.parameter(f"{name}.weight")
            form = self._weight_form(name)
            mean = weight.abs().mean()
            # ternary: 2^-frac nearest mean|W|; int8: four times the root mean square fits 127
            self.statistics[i] = mean if form == "ternary" else weight.pow(2).mean().sqrt() * (4 / 127)

    @torch.no_grad()
    def _observe_activations(self, built: NativeNodes, mean_squares: Values) -> None:
        fracs = {node.name: node.frac for node in built.nodes}
        sources = [built.observed[name] for name in self.activation_scales]
        now = torch.stack([mean_squares[source] * 4.0 ** -fracs[source] for source in sources])
        running = self.statistics[len(self.weight_scales) :]
        running.copy_(torch.where(running < 0, now, SCALE_MEMORY * running + (1 - SCALE_MEMORY) * now))

    @torch.no_grad()
    def _update_fracs(self) -> None:
        # Estimates of a batch or of weights that are not finite: the trainer sees the loss and undoes them.
        values = self.statistics.nan_to_num(1.0, 1.0, 1.0).tolist()
        split = len(self.weight_scales)
        fracs = [-round(math.log2(max(v, 1e-9))) for v in values[:split]]
        for i, name in enumerate(self.weight_scales):
            form = self._weight_form(name)
            if form == "int8":
                fracs[i] = math.floor(-math.log2(max(values[i], 1e-9)))
        for name, mean_square in zip(self.activation_scales, values[split:], strict=True):
            bits = self._bits(name)
            rms = math.sqrt(max(mean_square, 1e-12))
            fracs.append(math.floor(math.log2(((1 << bits) - 1) / (SCALE_SIGMAS * rms))))
        names = [*self.weight_scales, *self.activation_scales]
        limits = [self._BC_range if name.endswith(".BC") else (0, MAX_FRAC) for name in names]
        fracs = [min(max(f, low), high) for f, (low, high) in zip(fracs, limits, strict=True)]
        by_name = dict(zip(names, fracs, strict=True))
        for name in names:
            if name.endswith(".y"):
                layer = name.removesuffix(".y")
                most = largest_y_frac(self.config, by_name[f"{layer}.x"], by_name[f"{layer}.BC"])
                by_name[name] = min(by_name[name], most)
        fracs = list(by_name.values())
        if fracs != self._on_host("fracs"):
            self.fracs.copy_(torch.tensor(fracs))

    def _bits(self, name: str) -> int:
        """Width a static scale fills: ``y`` may be wider than int8, but is scaled as int8."""
        return self.config.pool_bits if name == "pooled" else self.config.activation_bits

    def observe(self, inputs: Tensor) -> None:
        """First estimate of all static scales, from one unrounded forward over ``inputs``."""
        self._observe_weights()
        self._update_fracs()
        self._run(inputs, rounding=False, learning=True)
        self._update_fracs()

    def freeze_scales(self) -> None:
        """Make the static scales final; training goes on with them."""
        self.frozen.fill_(True)

    # -- forward -----------------------------------------------------------------------------------------

    def _run(
        self, inputs: Tensor, rounding: bool, learning: bool, trace: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Real-valued logits; when ``learning``, updates the estimates behind the scales."""
        built = build_nodes(self.config, self.scales(), self.constant)
        inputs = inputs.to(self.latent["logits/bias"].dtype)
        sources = set(built.observed.values()) if learning else set()
        mean_squares: Values = {}

        def observe(name: str, value: Tensor) -> None:
            # What is computed anew in the backward pass has been seen.
            if name in sources and name not in mean_squares:
                mean_squares[name] = value.detach().pow(2).mean()

        fused = inputs.is_cuda if self.fused is None else self.fused
        if fused and rounding and trace is None:
            # Imported late: there is no Triton but on Linux.
            from mamba_int.fusion import plan

            values = execute_plan(plan(built.nodes), built.nodes, inputs, self.gradient_checkpointing)
            if learning:
                # A fused run does not write what it rounds: a few sequences, node by node, show it.
                with torch.no_grad():
                    few = max(1, OBSERVED_TOKENS // inputs.shape[1])
                    execute_nodes(built.nodes, inputs[:few], observe=observe)
        else:
            checkpointing = self.gradient_checkpointing and trace is None
            values = execute_nodes(built.nodes, inputs, trace, rounding, observe, checkpointing)
        if learning:
            self._observe_activations(built, mean_squares)
        return values[built.output] * 2.0 ** -built.nodes[-1].frac

    def forward(self, inputs: Tensor, trace: dict[str, Tensor] | None = None) -> Tensor:
        """Real-valued logits.

        Args:
            inputs: integers [batch, seq_len, n_features], or token ids [batch, T].
            trace: if given, receives every tensor of the graph by name, as integers held in floats.

        Returns:
            float [batch, n_classes], or [batch, T, vocab_size]: integer logits times 2^-frac.
        """
        learning = self.training and self.exact and self.observing and not self.scales_frozen
        if learning:
            self._observe_weights()
            self._update_fracs()
        return self._run(inputs, self.exact, learning, trace)

    @torch.no_grad()
    def frozen_integers(self) -> dict[str, Tensor]:
        """Every constant of the graph as int64, by ``node.constant``: what the checkpoint keeps.

        Recomputing them on another machine could differ in the last place of a mean or a cosine.
        """
        built = build_nodes(self.config, self.scales(), self.constant)
        result = {}
        for node in built.nodes:
            for key, value in node.constants.items():
                result[f"{node.name}.{key}"] = value.double().round().long()
        return result
