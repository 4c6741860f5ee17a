"""Every rule of the hardware broken once, and what the message says."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from nki_simulated import body, breaks, nisa, nki, nl, normal, psum, sbuf

from vllm_neuron_rmsq.kernels.nki.simulator import NkiSimulationError, NkiSimulationWarning, simulate


def partly_written():
    tile = sbuf((1, 8), value=None)
    nisa.memset(tile[:, 0:7], 0)
    return tile


def total(tile, result, cmd=nisa.reduce_cmd.reset_reduce):
    nisa.tensor_scalar_reduce(tile, sbuf((4, 8)), nl.add, 0.0, nl.add, result, reduce_cmd=cmd)


def clobber(between):
    """A sum in two steps, with an instruction between them that uses the accumulator too."""
    tile = sbuf((4, 8), value=None)
    total(tile, None)
    between(tile)
    total(tile, sbuf((4, 1)), nisa.reduce_cmd.reduce)


FP8_FN = "float8_e4m3fn"
double_row = nisa.matmul_perf_mode.double_row
BROKEN = {
    "129 partitions": (r"ndarray: shape\[0\]: expected at most 128, got 129", lambda: sbuf((129, 4))),
    "no free dimension": ("a partition and a free dimension", lambda: sbuf((128,))),
    "SBUF overrun": (
        r"at most 229376 B of SBUF .* got 229380 B \(4 B more on top of 229376 B: 229376 B big float32",
        lambda: (sbuf((128, 57344), name="big", value=None), sbuf((1, 1)))[0],
    ),
    "SBUF overrun by address": ("end at byte 229380", lambda: sbuf((1, 1), address=(0, 229376))),
    "SBUF overrun beside addresses": (
        "at most 229376 B of SBUF",
        lambda: (sbuf((1, 1), address=(0, 229372)), sbuf((1, 1))),
    ),
    "PSUM overrun": ("at most 16384 B of PSUM", lambda: [psum((1, 1)) for _ in range(9)]),
    "PSUM address inside a bank": ("start of a PSUM bank", lambda: psum((1, 1), address=(0, 512))),
    "address off the partitions": ("partitions within 0..127", lambda: sbuf((64, 1), address=(96, 0))),
    "unwritten read": (
        r"tensor_copy: src: expected memory that was written, got 2048 unwritten bytes of <'t' sbuf",
        lambda: nisa.tensor_copy(sbuf((128, 4)), sbuf((128, 4), value=None, name="t")),
    ),
    "start partition": (
        "start at partition 0 or 32 or 64 or 96, got start 5",
        lambda: nisa.memset(sbuf((128, 4))[5:9], 0),
    ),
    "start partition of 64": (
        "start at partition 0 or 64, got start 32",
        lambda: nisa.memset(sbuf((128, 4))[32:96], 0),
    ),
    "too many elements": (
        "at most 65536 elements per partition",
        lambda: nisa.memset(sbuf((1, 65537), dtype=nl.int8, value=None), 0),
    ),
    "stride too wide": (
        "strides up to 32767 elements",
        lambda: nisa.memset(sbuf((1, 2, 32768), dtype=nl.int8, value=None)[:, :, 0:1], 0),
    ),
    "DMA from PSUM": (
        "dma_copy: src: expected a tensor in sbuf or",
        lambda: nisa.dma_copy(sbuf((1, 1)), psum((1, 1))),
    ),
    "DMA of other sizes": ("as many elements as dst", lambda: nisa.dma_copy(sbuf((1, 4)), sbuf((1, 5)))),
    "DMA priority": ("NeuronCore-v4", lambda: nisa.dma_copy(sbuf((1, 4)), sbuf((1, 4)), priority=1)),
    "DMA engine": (
        "with dge_mode.hwdge",
        lambda: nisa.dma_copy(sbuf((1, 4)), sbuf((1, 4)), engine=nisa.engine.sync),
    ),
    "transpose of bytes": (
        "a dtype of 2 or 4 bytes",
        lambda: nisa.dma_transpose(sbuf((8, 8), dtype=nl.uint8), sbuf((8, 8), dtype=nl.uint8)),
    ),
    "transpose hwdge": (
        r"shape\[0\]: 16",
        lambda: nisa.dma_transpose(
            sbuf((8, 32), dtype=nl.uint16), sbuf((32, 8), dtype=nl.uint16), dge_mode=nisa.dge_mode.hwdge
        ),
    ),
    "transpose shape": (r"shape \(8, 4\)", lambda: nisa.dma_transpose(sbuf((4, 8)), sbuf((4, 8)))),
    "dma_compute operator": (
        "reduce_op: expected one of add",
        lambda: nisa.dma_compute(sbuf((1, 1)), [sbuf((1, 1))], nl.maximum),
    ),
    "dma_compute scales": (
        "1.0 for each",
        lambda: nisa.dma_compute(sbuf((1, 1)), [sbuf((1, 1))], nl.add, scales=[2.0]),
    ),
    "memset's value": ("a whole number of uint8, got 256", lambda: sbuf((1, 1), dtype=nl.uint8, value=256)),
    "float in integers": (
        "a whole number of int32, got 2.0, which is no integer",
        lambda: sbuf((1, 1), dtype=nl.int32, value=2.0),
    ),
    "packed constant": ("0, the only constant", lambda: sbuf((1, 1), dtype=nl.float8_e4m3fn_x4, value=1)),
    "hwdge casts": (
        "dge_mode: expected another to cast float32 to bfloat16: hwdge moves bytes",
        lambda: nisa.dma_copy(sbuf((1, 4), nl.bfloat16), sbuf((1, 4)), dge_mode=nisa.dge_mode.hwdge),
    ),
    "shifted copy": (
        "src: expected the very elements of dst or none of them",
        lambda: (lambda t: nisa.tensor_copy(t[:, 1:8], t[:, 0:7]))(sbuf((1, 8))),
    ),
    "turned copy": (
        "data1: expected the very elements of dst or none of them",
        lambda: (lambda t: nisa.tensor_tensor(t, t.permute((0, 2, 1)), sbuf((1, 4, 4)), nl.add))(
            sbuf((1, 4, 4))
        ),
    ),
    "broadcast of an element that is overwritten": (
        "src: expected the very elements of dst or none of them",
        lambda: (lambda t: nisa.tensor_copy(t, t[:, 0:1].broadcast(1, 8)))(sbuf((1, 8))),
    ),
    "widening in place": (
        "src: expected the very elements of dst or none of them",
        lambda: (lambda t: nisa.tensor_copy(t, t.view(nl.bfloat16)[:, 0:8]))(sbuf((1, 8))),
    ),
    "clobbered accumulator": (
        "reduce_cmd: expected the accumulator as this chain left it, got one that was reset at",
        lambda: clobber(lambda t: total(t, sbuf((4, 1)))),
    ),
    "accumulator used by another operator": (
        "reduce_cmd: expected the accumulator of a chain of nl.add, got one that nl.maximum has used",
        lambda: clobber(
            lambda t: nisa.select_reduce(
                t,
                sbuf((4, 8), dtype=nl.uint8),
                sbuf((4, 8)),
                0.0,
                reduce_cmd=nisa.reduce_cmd.reset_reduce,
                reduce_op=nl.maximum,
            )
        ),
    ),
    "accumulator in doubt": (
        "reset_reduce: an instruction that may change the accumulator",
        lambda: clobber(lambda t: nisa.select_reduce(t, sbuf((4, 8), dtype=nl.uint8), sbuf((4, 8)), 0.0)),
    ),
    "statistics of too many": (
        "at most 512 elements",
        lambda: nisa.bn_stats(sbuf((4, 6)), sbuf((4, 513))),
    ),
    "statistics of no triples": ("triples", lambda: nisa.bn_aggr(sbuf((4, 2)), sbuf((4, 7)))),
    "result of statistics": (
        "dst: expected 4 partitions of 6",
        lambda: nisa.bn_stats(sbuf((4, 2)), sbuf((4, 9))),
    ),
    "search in too few": (
        "src: expected 8 to 16384 elements",
        lambda: nisa.max8(sbuf((4, 8)), sbuf((4, 7))),
    ),
    "search for too many": (
        "vals: expected 8 elements",
        lambda: nisa.nc_find_index8(sbuf((4, 8), dtype=nl.uint32), sbuf((4, 9)), sbuf((4, 9))),
    ),
    "index dtype": (
        "dst: expected dtype uint16 or uint32",
        lambda: nisa.nc_find_index8(sbuf((4, 8), dtype=nl.int32), sbuf((4, 9)), sbuf((4, 8))),
    ),
    "range_select's constant": (
        "on_false_value: expected fp32's lowest value",
        lambda: nisa.range_select(
            sbuf((4, 8)),
            sbuf((4, 8)),
            nl.greater_equal,
            nl.less,
            sbuf((4, 1)),
            sbuf((4, 1)),
            on_false_value=0.0,
        ),
    ),
    "shuffle mask": (
        "shuffle_mask: expected 32 partitions",
        lambda: nisa.nc_stream_shuffle(sbuf((32, 4)), sbuf((32, 4)), [0] * 31),
    ),
    "shuffle from nowhere": (
        r"shuffle_mask: expected partitions of src, of which there are 1, got \[1\]",
        lambda: nisa.nc_stream_shuffle(sbuf((2, 4)), sbuf((1, 4)), list(range(32))),
    ),
    "engine cannot memset": (
        "vector or gpsimd, got scalar",
        lambda: nisa.memset(sbuf((1, 1)), 0, engine=nisa.engine.scalar),
    ),
    "GpSimdE and PSUM": (
        "GpSimdE cannot access PSUM",
        lambda: nisa.tensor_copy(sbuf((1, 1)), psum((1, 1)), engine=nisa.engine.gpsimd),
    ),
    "both inputs in PSUM": (
        "at most one of them in PSUM",
        lambda: nisa.tensor_tensor(sbuf((1, 1)), psum((1, 1)), psum((1, 1)), nl.add),
    ),
    "partitions differ": ("64 partitions, as dst", lambda: nisa.tensor_copy(sbuf((64, 4)), sbuf((32, 4)))),
    "elements differ": ("4 elements each, as dst", lambda: nisa.tensor_copy(sbuf((64, 4)), sbuf((64, 5)))),
    "no operator": (
        "an operator of nki.language",
        lambda: nisa.tensor_tensor(sbuf((1, 1)), sbuf((1, 1)), sbuf((1, 1)), np.add),
    ),
    "an activation as operator": (
        "op: expected one of abs_max",
        lambda: nisa.tensor_tensor(sbuf((1, 1)), sbuf((1, 1)), sbuf((1, 1)), nl.exp),
    ),
    "operator of a later generation": (
        r"an operator gen3 has \(this one: gen4\), got nl.abs_max",
        lambda: nisa.tensor_tensor(sbuf((1, 1)), sbuf((1, 1)), sbuf((1, 1)), nl.abs_max),
    ),
    "bitvec on floats": (
        "an integer dtype",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.bitwise_and, 3),
    ),
    "mixed operator kinds": (
        "op1: expected the kind of op0",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.add, 1.0, op1=nl.bitwise_and, operand1=3),
    ),
    "operand dtype": (
        "operand0: expected dtype float32",
        lambda: nisa.tensor_scalar(sbuf((4, 2)), sbuf((4, 2)), nl.add, sbuf((4, 1), dtype=nl.bfloat16)),
    ),
    "operand shape": (
        r"operand0: expected shape \(4, 1\)",
        lambda: nisa.tensor_scalar(sbuf((4, 2)), sbuf((4, 2)), nl.add, sbuf((4, 2))),
    ),
    "ScalarE's tensor_scalar": (
        "on ScalarE",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.maximum, 1.0, engine=nisa.engine.scalar),
    ),
    "GpSimdE's tensor_scalar": (
        "gpsimd for rsqrt",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.add, 1.0, engine=nisa.engine.gpsimd),
    ),
    "operand without operator": (
        "None without op1",
        lambda: nisa.tensor_scalar(sbuf((1, 1)), sbuf((1, 1)), nl.add, 1.0, operand1=1.0),
    ),
    "reduced partitions": (
        "last free dimensions",
        lambda: nisa.tensor_reduce(sbuf((1, 4)), nl.add, sbuf((8, 4)), axis=0),
    ),
    "reduced middle": (
        "last free dimensions",
        lambda: nisa.tensor_reduce(sbuf((8, 4)), nl.add, sbuf((8, 3, 4)), axis=1),
    ),
    "reduction result": (
        "8 partitions of 3 elements",
        lambda: nisa.tensor_reduce(sbuf((8, 4)), nl.add, sbuf((8, 3, 4)), axis=2),
    ),
    "accumulator never reset": (
        "a reset before",
        lambda: nisa.activation(
            sbuf((1, 4)), nl.copy, sbuf((1, 4)), reduce_op=nl.add, reduce_cmd=nisa.reduce_cmd.reduce
        ),
    ),
    "activation's reduction": (
        "reduce_op: expected one of add",
        lambda: nisa.activation_reduce(sbuf((1, 4)), nl.copy, sbuf((1, 4)), nl.maximum, sbuf((1, 1))),
    ),
    "matmul into SBUF": (
        "dst: expected a tensor in psum",
        lambda: nisa.nc_matmul(sbuf((4, 4)), sbuf((4, 4)), sbuf((4, 4))),
    ),
    "matmul from PSUM": (
        "moving: expected a tensor in sbuf",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), psum((4, 4))),
    ),
    "matmul dtype": (
        "stationary: expected dtype",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4), dtype=nl.int8), sbuf((4, 4))),
    ),
    "matmul OCP FP8": (
        "stationary: expected dtype",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4), dtype=FP8_FN), sbuf((4, 4), dtype=FP8_FN)),
    ),
    "matmul mixes fp32": (
        "only together",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((4, 4), dtype=nl.bfloat16)),
    ),
    "matmul into bf16": (
        "dst: expected float32",
        lambda: nisa.nc_matmul(psum((4, 4), dtype=nl.bfloat16), sbuf((4, 4)), sbuf((4, 4))),
    ),
    "moving too wide": (
        "moving: expected a free size of at most 512, got 513",
        lambda: nisa.nc_matmul(psum((4, 513)), sbuf((4, 4)), sbuf((4, 513))),
    ),
    "stationary too wide": (
        "stationary: expected a free size of at most 128, got 129",
        lambda: nisa.nc_matmul(psum((128, 4)), sbuf((4, 129)), sbuf((4, 4))),
    ),
    "contraction differs": (
        "moving: expected 4 partitions",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((8, 4))),
    ),
    "matmul's output": (
        "dst: expected 4 partitions of 8 elements",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((4, 8))),
    ),
    "across PSUM banks": (
        "one PSUM bank of 2048 B",
        lambda: nisa.nc_matmul(psum((4, 1024), value=None)[:, 256:768], sbuf((4, 4)), sbuf((4, 512))),
    ),
    "double_row shape": (
        r"operands \[partitions, 2, free\]",
        lambda: nisa.nc_matmul(
            psum((4, 4)),
            sbuf((4, 8), dtype=nl.float8_e4m3),
            sbuf((4, 8), dtype=nl.float8_e4m3),
            perf_mode=double_row,
        ),
    ),
    "double_row dtype": (
        "stationary: expected dtype float8_e4m3 or float8_e5m2",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 2, 4)), sbuf((4, 2, 4)), perf_mode=double_row),
    ),
    "tile position": (
        "multiples of",
        lambda: nisa.nc_matmul(
            psum((4, 4)), sbuf((4, 4)), sbuf((4, 4)), tile_position=(16, 0), tile_size=(32, 128)
        ),
    ),
    "accumulate onto nothing": (
        "accumulate: expected False for the first matmul",
        lambda: nisa.nc_matmul(psum((4, 4), value=None), sbuf((4, 4)), sbuf((4, 4)), accumulate=True),
    ),
    "VectorE's transpose": (
        r"at most \[32, 32\] on vector",
        lambda: nisa.nc_transpose(sbuf((4, 64)), sbuf((64, 4)), engine=nisa.engine.vector),
    ),
    "transpose's dtype": (
        "data's dtype float32",
        lambda: nisa.nc_transpose(psum((4, 4), dtype=nl.bfloat16), sbuf((4, 4))),
    ),
    "predicate dtype": (
        "predicate: expected dtype uint8",
        lambda: nisa.tensor_copy_predicated(sbuf((4, 4)), sbuf((4, 4)), sbuf((4, 4))),
    ),
    "iota pattern": ("counts whose product is 4", lambda: nisa.iota(sbuf((4, 4)), [[1, 5]])),
    "broadcast destination in HBM": (
        "without a broadcast dimension",
        lambda: nisa.dma_copy(nl.zeros((4, 1), nl.float32, nl.shared_hbm).broadcast(1, 4), sbuf((4, 4))),
    ),
    "index out of bounds": ("an index within 0..3, got 4", lambda: sbuf((8, 4))[:, 4]),
    "slice out of bounds": ("a non-empty slice within 0..4", lambda: sbuf((8, 4))[:, 2:5]),
    "ds out of bounds": ("ds within 0..4", lambda: sbuf((8, 4))[:, nl.ds(2, 3)]),
    "partition moved": ("partition dimension left where it is", lambda: sbuf((8, 4)).permute((1, 0))),
    "partition reshaped": ("partition dimension left where it is", lambda: sbuf((8, 4)).reshape((4, 8))),
    "reshape of a strided view": ("without a copy", lambda: sbuf((8, 4, 4))[:, :, 0:2].reshape((8, 8))),
    "partition stride": ("the partition stride 4", lambda: sbuf((8, 4)).ap([[8, 4], [1, 4]])),
    "ap out of bounds": ("elements below 4", lambda: sbuf((8, 4)).ap([[4, 8], [1, 5]])),
    "six dimensions": ("at most 5 dimensions", lambda: sbuf((8, 32)).reshape((8, 2, 2, 2, 2, 2))),
    "unaligned view": ("divisible by 4", lambda: sbuf((8, 6), dtype=nl.uint8).view(nl.float32)),
    "assignment": ("an instruction that writes", lambda: sbuf((8, 4)).__setitem__(0, 1)),
    "register never written": ("a register that was written", lambda: nisa.register_alloc().read()),
    "frozen counter": (
        "no loop counter",
        lambda: [nisa.register_move(i, 1) for i in nl.dynamic_range(2)],
    ),
    "barrier alone": (
        r"\(0, 1\) on a grid of 2",
        lambda: nisa.core_barrier(nl.zeros((4,), nl.float32, nl.shared_hbm), (0, 1)),
    ),
    "shift by a float": (
        "an integer",
        lambda: nisa.tensor_scalar(
            sbuf((1, 1), dtype=nl.int8), sbuf((1, 1), dtype=nl.int8), nl.left_shift, 1.0
        ),
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_caught(rule):
    match, statements = BROKEN[rule]
    breaks(match, statements)


def multiply(stationary, moving, **kwargs):
    free = 2 if "perf_mode" in kwargs else 1
    dst = psum((stationary.free_size // free, moving.free_size // free), value=None)
    nisa.nc_matmul(dst, stationary, moving, **kwargs)


def eight_bits(shape):
    return sbuf(shape, dtype=nl.float8_e4m3)


DOUBTFUL = {
    "kernel in a kernel": ("to have no decorator, got a kernel", lambda: nki.jit(partly_written)()),
    "broadcast destination": (
        "without a broadcast dimension",
        lambda: nisa.memset(sbuf((4, 1)).broadcast(1, 4), 0),
    ),
    "tensor as a condition": ("`if tensor`, which is always true", lambda: bool(sbuf((4, 1)))),
    "partly unwritten read": (
        "tensor_copy: src: expected memory that was written, got 4 unwritten bytes",
        lambda: nisa.tensor_copy(sbuf((1, 8)), partly_written()),
    ),
    "accumulate onto a memset": (
        "accumulate: expected False for the first matmul .* got True",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((4, 4)), accumulate=True),
    ),
    "infer accumulation onto a memset": (
        "accumulate: expected False for the first matmul .* got None on a location that something else wrote",
        lambda: nisa.nc_matmul(psum((4, 4)), sbuf((4, 4)), sbuf((4, 4))),
    ),
    "FP8 overflow": (
        r"tensor_copy: dst: expected values within ±240.0 \(float8_e4m3\), got larger ones\n.*\(6 times\)",
        lambda: nisa.tensor_copy(sbuf((2, 3), dtype=nl.float8_e4m3), sbuf((2, 3), value=1000.0)),
    ),
    "FP8 overflow in a DMA": (
        r"dma_copy: dst: expected values within ±448.0 \(float8_e4m3fn\)",
        lambda: nisa.dma_copy(sbuf((2, 3), dtype=FP8_FN), sbuf((2, 3), value=1000.0)),
    ),
    "FP8 overflow of a constant": (
        r"memset: dst: expected values within ±57344.0",
        lambda: sbuf((2, 3), dtype=nl.float8_e5m2, value=1e6),
    ),
    "activation outside of its range": (
        r"activation: data: expected inputs of nl.rsqrt within \[6.46.*e-27, 1.58.*\], .*\n.*\(4 times\)",
        lambda: nisa.activation(sbuf((1, 4)), nl.rsqrt, sbuf((1, 4), value=1e-30)),
    ),
    "two free dimensions": (
        "stationary: expected one free dimension",
        lambda: multiply(sbuf((4, 4, 8))[:, :, 0:4], sbuf((4, 4))),
    ),
    "pairs side by side": (
        "stationary: expected with double_row two dense halves",
        lambda: multiply(
            eight_bits((4, 16, 2)).permute((0, 2, 1)), eight_bits((4, 2, 4)), perf_mode=double_row
        ),
    ),
    "odd pair stride": (
        "moving: expected .* an even number of bytes apart, got a pair stride of 5",
        lambda: multiply(eight_bits((4, 2, 4)), eight_bits((4, 2, 5)), perf_mode=double_row),
    ),
    "strided halves": (
        "moving: expected with double_row two dense halves",
        lambda: multiply(eight_bits((4, 2, 4)), eight_bits((4, 2, 8, 2))[:, :, :, 0], perf_mode=double_row),
    ),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_what_is_doubtful_on_the_hardware_is_a_warning(case):
    match, statements = DOUBTFUL[case]
    with pytest.warns(NkiSimulationWarning, match=match) as caught:
        body(statements)
    assert (
        len(caught) == 1 and f"{__file__}:" in str(caught[0].message)
    ) or case == "FP8 overflow of a constant"


def test_what_is_in_order_warns_of_nothing():
    def statements():
        in_place = sbuf((4, 8))
        nisa.tensor_tensor(in_place, in_place, in_place, nl.add)
        nisa.tensor_copy(in_place[:, 0:8:2], in_place[:, 1:8:2])
        nisa.tensor_copy(in_place.view(nl.bfloat16)[:, 0:8], in_place)
        nisa.tensor_copy(in_place.reshape((4, 2, 4)), in_place)
        total(in_place, None)
        total(in_place, sbuf((4, 1)), nisa.reduce_cmd.reduce)
        total(in_place, sbuf((4, 1)))
        multiply(sbuf((4, 2, 2, 4)), sbuf((4, 4, 4))[:, :, 0:2])
        multiply(eight_bits((4, 2, 6)), eight_bits((4, 2, 2, 6)), perf_mode=double_row)
        nisa.tensor_copy(sbuf((1, 4), dtype=nl.float8_e4m3), sbuf((1, 4), value=np.inf))
        nisa.tensor_copy(sbuf((1, 4), dtype=nl.float8_e4m3), sbuf((1, 4), value=240.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        body(statements)


def test_unwritten_elements_read_as_nan():
    def kernel():
        out = nl.ndarray((1, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        tile = sbuf((1, 8), value=None)
        nisa.tensor_copy(tile, partly_written())
        nl.store(out, tile)
        return out

    with pytest.warns(NkiSimulationWarning, match="4 unwritten bytes"):
        got = simulate(kernel)()
    np.testing.assert_array_equal(got, [[0] * 7 + [np.nan]])


def test_the_message_names_instruction_operand_and_source_line():
    def statements():
        nisa.tensor_copy(dst=sbuf((4, 4)), src=sbuf((4, 5)))

    with pytest.raises(NkiSimulationError) as caught:
        body(statements)
    message = str(caught.value)
    assert message.startswith(
        "nki.isa.tensor_copy: src: expected 4 elements each, as dst, got <sbuf float32[4, 5]>"
    )
    assert f"{__file__}:" in message and "nisa.tensor_copy(dst=sbuf((4, 4)), src=sbuf((4, 5)))" in message


def test_a_kernels_own_assertion_is_no_simulation_error():
    def kernel(x):
        assert x.shape[0] == 3, "three rows"

    with pytest.raises(AssertionError, match="three rows"):
        simulate(kernel)(normal(4, 4))
    assert not issubclass(NkiSimulationError, AssertionError)


def test_memory_is_free_again_when_the_last_view_is_gone():
    def statements():
        for _ in range(5):
            view = sbuf((128, 50000))[:, 0:1]
            assert view.shape == (128, 1)
            del view
        del _
        sbuf((128, 57344))

    body(statements)


def test_a_result_not_written_completely_is_an_error():
    def kernel(x):
        out = nl.ndarray((4, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out[:, 0:4], src=x)
        return out

    with pytest.raises(NkiSimulationError, match=r"return: result: .* 64 unwritten bytes"):
        simulate(kernel)(normal(4, 4))
    with pytest.raises(NkiSimulationError, match="a tensor in HBM"):
        simulate(lambda: sbuf((4, 4)))()


@pytest.mark.parametrize("name", ["quantize_mx", "dropout", "nc_matmul_mx", "no_such_instruction"])
def test_what_is_not_covered_names_the_instruction(name):
    with pytest.raises(NotImplementedError, match=f"nki.isa.{name} is not covered"):
        getattr(nisa, name)
    assert not hasattr(nisa, name) and not hasattr(nl, name) and not hasattr(nki, name)


def test_indirect_forms_that_are_not_covered_say_so():
    def rows():
        return nl.zeros((8, 8), nl.float32, nl.shared_hbm).vector_select(
            0, sbuf((4, 1), dtype=nl.int32, value=1)
        )

    for instruction, step in {
        "dma_transpose": lambda: nisa.dma_transpose(sbuf((8, 4)), rows()),
        "dma_compute": lambda: nisa.dma_compute(sbuf((4, 8)), [rows()], nl.add),
    }.items():
        with pytest.raises(NotImplementedError, match=f"nki.isa.{instruction} with"):
            body(step)
