"""The structs of cpp/program.h, and a program written into them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

from oarsmith.native import program as parts
from oarsmith.native.program import ACTIVATIONS, FORMATS, INTO, KINDS, Program


class Norm(ctypes.Structure):
    _fields_ = (
        ("size", c_int64),
        ("count", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("centered", c_int32),
        ("weights", c_int64),
    )


class Turn(ctypes.Structure):
    _fields_ = (("rotation", c_int64), ("offset", c_int64))


class Attention(ctypes.Structure):
    _fields_ = (
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("key_dim", c_int64),
        ("value_dim", c_int64),
        ("keys_at", c_int64),
        ("values_at", c_int64),
        ("layer", c_int64),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("turns", Turn * 2),
        ("window", c_int64),
        ("bias_positions", c_int64),
        ("bias", c_void_p),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("softcap", c_float),
        ("log_n", c_float),
    )


class Matrix(ctypes.Structure):
    _fields_ = (("format", c_int32), ("rows", c_int64), ("columns", c_int64), ("blocks", c_void_p))


class Experts(ctypes.Structure):
    _fields_ = (
        ("count", c_int64),
        ("top_k", c_int64),
        ("sigmoid", c_int32),
        ("normalize", c_int32),
        ("scale", c_float),
        ("activation", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
        ("groups", c_int64),
        ("kept_groups", c_int64),
        ("best_of_group", c_int64),
        ("correction", c_void_p),
        ("hidden", c_int64),
        ("gate_up", POINTER(Matrix)),
        ("down", POINTER(Matrix)),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
    )


class Operation(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("into", c_int32),
        ("source", c_int32),
        ("target", c_int32),
        ("scores", c_int32),
        ("activation", c_int32),
        ("keep", c_float),
        ("scale", c_float),
        ("alpha", c_float),
        ("limit", c_float),
        ("norm", Norm),
        ("matrix", Matrix),
        ("bias", c_void_p),
        ("positions", c_void_p),
        ("position_offset", c_int64),
        ("target_offset", c_int64),
        ("count", c_int64),
        ("source_step", c_int64),
        ("target_step", c_int64),
        ("matrices", POINTER(Matrix)),
        ("state", c_int64),
        ("attention", POINTER(Attention)),
        ("experts", POINTER(Experts)),
    )


class Rotation(ctypes.Structure):
    _fields_ = (
        ("frequencies", c_int64),
        ("sets", c_void_p),
        ("factor", c_float),
        ("adjacent", c_int32),
        ("of_blocks", c_int64),
    )


class StepSpec(ctypes.Structure):
    _fields_ = (
        ("threads", c_int64),
        ("max_rows", c_int64),
        ("num_buffers", c_int64),
        ("widths", POINTER(c_int64)),
        ("stream", c_int32),
        ("head_input", c_int32),
        ("logits", c_int32),
        ("num_body", c_int64),
        ("num_head", c_int64),
        ("body", POINTER(Operation)),
        ("head", POINTER(Operation)),
        ("num_rotations", c_int64),
        ("rotations", POINTER(Rotation)),
        ("num_layers", c_int64),
        ("cache_dims", POINTER(c_int64)),
        ("stored", c_int32),
        ("cache_form", c_int32),
        ("cache_scales", POINTER(c_float)),
        ("num_pages", c_int64),
        ("page_size", c_int64),
        ("num_states", c_int64),
        ("num_slots", c_int64),
        ("state_widths", POINTER(c_int64)),
    )


class StepRows(ctypes.Structure):
    _fields_ = (
        ("count", c_int64),
        ("tokens", c_void_p),
        ("places", c_void_p),
        ("sequences", c_void_p),
        ("positions", c_void_p),
        ("blocks", c_void_p),
        ("lows", c_void_p),
        ("highs", c_void_p),
        ("pages", c_void_p),
        ("slots", c_void_p),
    )


class SampleRow(ctypes.Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("temperature", c_double),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
        ("typical_p", c_double),
        ("uniform", c_double),
        ("allowed", c_void_p),
        ("banned", c_void_p),
        ("bias_ids", c_void_p),
        ("bias", c_void_p),
        ("seen", c_void_p),
        ("seen_counts", c_void_p),
        ("num_banned", c_int64),
        ("num_bias", c_int64),
        ("num_seen", c_int64),
        ("repetition", c_double),
        ("frequency", c_double),
        ("presence", c_double),
        ("num_top", c_int64),
        ("token", c_int64),
        ("logprob", c_double),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
    )


_ALL: tuple[type[ctypes.Structure], ...] = (
    Norm,
    Attention,
    Experts,
    Matrix,
    Operation,
    Rotation,
    StepSpec,
    StepRows,
    SampleRow,
)
SIZES = tuple(ctypes.sizeof(struct) for struct in _ALL)
_NO_TURN = Turn(-1, 0)


class ProgramStructs:
    """A program with the addresses that its weights have. The step copies lists of structs, not what they point to."""

    def __init__(self, program: Program, arena: int) -> None:
        self._arena = arena
        self._alive: list[Any] = []
        self.body = self._list(Operation, [self._operation(op) for op in program.body])
        self.head = self._list(Operation, [self._operation(op) for op in program.head])
        self.rotations = self._list(Rotation, [self._rotation(rotation) for rotation in program.rotations])
        self.widths = self._list(c_int64, program.widths)
        self.cache_dims = self._list(c_int64, [number for dims in program.cache for number in dims])
        self.states = self._list(c_int64, program.states)

    def _list(self, kind: Any, values: Sequence[Any]) -> Any:
        array = (kind * len(values))(*values)
        self._alive.append(array)
        return array

    def _pointer(self, value: Any, make: Callable[[Any], Any]) -> Any:
        if value is None:
            return None
        struct = make(value)
        self._alive.append(struct)
        return ctypes.pointer(struct)

    def _at(self, place: parts.Vector | parts.Matrix | None) -> int | None:
        return None if place is None else self._arena + place.offset

    def _norm(self, norm: parts.Norm | None) -> Norm:
        if norm is None:
            return Norm()
        at = self._at
        return Norm(norm.size, norm.count, at(norm.weight), at(norm.bias), norm.eps, norm.centered, norm.weights)

    def _matrix(self, matrix: parts.Matrix | None, width: int = 0) -> Matrix:
        if matrix is None:
            return Matrix(0, 0, width, None)
        return Matrix(FORMATS.index(matrix.format), matrix.rows, matrix.columns, self._at(matrix))

    def _attention(self, spec: parts.Attention) -> Attention:
        return Attention(
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            keys_at=spec.keys_at,
            values_at=spec.values_at,
            layer=spec.layer,
            q_norm=self._norm(spec.q_norm),
            k_norm=self._norm(spec.k_norm),
            turns=(*(Turn(turn.rotation, turn.offset) for turn in spec.turns), _NO_TURN, _NO_TURN)[:2],
            window=spec.window or 0,
            bias_positions=0 if spec.bias is None else spec.bias.size // spec.heads,
            bias=self._at(spec.bias),
            sinks=self._at(spec.sinks),
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            log_n=0.0 if spec.log_n is None else spec.log_n,
        )

    def _experts(self, spec: parts.Experts) -> Experts:
        return Experts(
            count=len(spec.gate_up),
            top_k=spec.top_k,
            sigmoid=spec.sigmoid,
            normalize=spec.normalize,
            scale=spec.scale,
            activation=ACTIVATIONS.index(spec.activation),
            alpha=spec.alpha,
            limit=spec.limit,
            groups=spec.groups,
            kept_groups=spec.kept_groups,
            best_of_group=spec.best_of_group,
            correction=self._at(spec.correction),
            hidden=spec.hidden,
            gate_up=self._list(Matrix, [self._matrix(matrix) for matrix in spec.gate_up]),
            down=self._list(Matrix, [self._matrix(matrix) for matrix in spec.down]),
            gate_up_bias=self._at(spec.gate_up_bias),
            down_bias=self._at(spec.down_bias),
        )

    def _operation(self, op: parts.Operation) -> Operation:
        return Operation(
            kind=KINDS.index(op.kind),
            into=INTO.index(op.into),
            source=op.source,
            target=op.target,
            scores=op.scores,
            activation=ACTIVATIONS.index(op.activation),
            keep=op.keep,
            scale=op.scale,
            alpha=op.alpha,
            limit=op.limit,
            norm=self._norm(op.norm),
            matrix=self._matrix(op.matrix, op.width),
            bias=self._at(op.bias),
            positions=self._at(op.positions),
            position_offset=op.position_offset,
            target_offset=op.target_offset,
            count=len(op.matrices),
            source_step=op.source_step,
            target_step=op.target_step,
            matrices=self._list(Matrix, [self._matrix(matrix) for matrix in op.matrices]),
            state=op.state,
            attention=self._pointer(op.attention, self._attention),
            experts=self._pointer(op.experts, self._experts),
        )

    def _rotation(self, rotation: parts.Rotation) -> Rotation:
        at = self._at(rotation.sets)
        return Rotation(rotation.frequencies, at, rotation.factor, rotation.adjacent, rotation.of_blocks)
