"""What the schedules of the norm kernel share: the task, and the arithmetic of one number per row."""

try:
    import nki.isa as nisa
    import nki.language as nl
except ModuleNotFoundError:  # no Neuron SDK: the simulator's namespace
    from .simulator.nki import isa as nisa
    from .simulator.nki import language as nl

from .common import SCALE_BYTES, fp8_dtype, fp8_max, share

RSQRT_ON_GPSIMD = False
"""Where rsqrt runs. GpSimdE's is more precise and takes every fp32 number; AWS's kernels use ScalarE's."""

SCALE_FLOOR = 1e-6
NAN_CODES = 0x7F7F7F7F  # four codes that are NaN in both FP8 formats
LARGEST_RSQRT, SMALLEST_RSQRT = 2.0**96, 2.0**-87  # ScalarE's rsqrt is valid from 2^-87 to 2^97
RSQRT_SHIFT, SHIFT_ROOT = 2.0**-32, 2.0**-16  # times the first a mean square of any size is in that range
LARGEST_FP32 = 3.4028235e38


class Task(nl.NKIObject):
    """What a launch is to do, tensors as rows.

    Attributes:
        hidden, residual: ``[T, H]`` in HBM; residual may be None.
        out: ``[T, H + 4]`` (STATIC: ``[T, H]``) in HBM, uint8 or FP8.
        residual_out: ``[T, H]`` in HBM, None without a residual.
        gamma, pre_gamma: ``[1, H]`` in HBM, or None.
        static_scale: ``[128, 1]`` fp32 in HBM, or None.
        width: H.
        count: how many elements of a row the mean square is over; H unless rows are padded.
        first, last: this program's rows, ``first <= row < last``.
        eps, lower_bound: as the entries have them; lower_bound None does not clip.
        shift, root: rsqrt is of shift times the mean square, and times root what it should be. With an eps so
            small that it would be lost, 1: a row whose mean square is beyond LARGEST_RSQRT is invalid then.
        fp8, fp8_max: the codes' dtype and R.
        high: the largest code value, less than R where the lower bound makes it so.
    """

    def __init__(
        self,
        hidden: nl.NkiTensor,
        gamma: nl.NkiTensor,
        pre_gamma: nl.NkiTensor,
        residual: nl.NkiTensor,
        static_scale: nl.NkiTensor,
        eps: float,
        lower_bound: float | None,
        count: int,
        ocp: bool,
        out_dtype,
    ):
        shape = tuple(hidden.shape)
        width = shape[len(shape) - 1]
        rows = hidden.size // width
        out_width = width if static_scale != None else width + SCALE_BYTES
        self.out_tensor = nl.ndarray(
            shape[0 : len(shape) - 1] + (out_width,), dtype=out_dtype, buffer=nl.shared_hbm
        )
        self.out = self.out_tensor.reshape((rows, out_width))
        self.hidden = hidden.reshape((rows, width))
        self.residual, self.residual_out, self.residual_out_tensor = residual, residual, residual
        if residual != None:
            self.residual_out_tensor = nl.ndarray(shape, dtype=hidden.dtype, buffer=nl.shared_hbm)
            self.residual = residual.reshape((rows, width))
            self.residual_out = self.residual_out_tensor.reshape((rows, width))
        self.gamma = gamma
        if gamma != None:
            self.gamma = gamma.reshape((1, width))
        self.pre_gamma = pre_gamma
        if pre_gamma != None:
            self.pre_gamma = pre_gamma.reshape((1, width))
        self.static_scale = static_scale
        self.width = width
        self.count = count
        self.first, self.last = share(rows)
        self.eps = eps
        self.shift, self.root = 1.0, 1.0
        if not RSQRT_ON_GPSIMD and eps * RSQRT_SHIFT >= SMALLEST_RSQRT:
            self.shift, self.root = RSQRT_SHIFT, SHIFT_ROOT
        self.lower_bound = lower_bound
        self.fp8 = fp8_dtype(ocp)
        self.fp8_max = fp8_max(ocp)
        # A lower bound below R * SCALE_FLOOR is below every scale that it does not determine.
        self.high = self.fp8_max
        if lower_bound != None:
            self.high = min(self.fp8_max, lower_bound / SCALE_FLOOR)

    def results(self):
        """Return what the kernel returns: ``out``, with a residual a pair with ``residual_out``."""
        if self.residual == None:
            return self.out_tensor
        return self.out_tensor, self.residual_out_tensor


class Constants(nl.NKIObject):
    """Numbers that are the same for every row, on all 128 partitions: ``[128, 1]`` fp32.

    Attributes:
        zero: 0, the bias of every ScalarE instruction that needs none; NKI Library passes one to work around
            a runtime fault.
        eps: eps times the task's shift.
        limit: the largest sum of squares of a valid row; NaN where gamma is not finite, and no row is valid.
        static_factor: 1 / static_scale.
        high, low: STATIC with a lower bound: codes' values lie between them.
        zeros: scratch; ones: ``[128, 128]``.
    """

    def __init__(self, task: Task):
        pmax = nl.tile_size.pmax
        numbers = nl.ndarray((pmax, 7), dtype=nl.float32, buffer=nl.sbuf)
        self.zero = numbers[:, 0:1]
        self.eps = numbers[:, 1:2]
        self.limit = numbers[:, 2:3]
        self.static_factor = numbers[:, 3:4]
        self.high = numbers[:, 4:5]
        self.low = numbers[:, 5:6]
        self.zeros = numbers[:, 6:7]
        self.ones = nl.ndarray((pmax, pmax), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(self.ones, 1.0)
        nisa.memset(self.zero, 0.0)
        nisa.memset(self.eps, max(task.eps, SMALLEST_RSQRT) * task.shift)
        limit = LARGEST_FP32
        if task.gamma != None and not RSQRT_ON_GPSIMD:
            limit = min(LARGEST_FP32, LARGEST_RSQRT / task.shift * task.count)
        nisa.memset(self.limit, limit)
        if task.static_scale != None:
            nisa.dma_copy(dst=self.static_factor, src=task.static_scale)
            nisa.reciprocal(dst=self.static_factor, data=self.static_factor)
            if task.lower_bound != None:
                nisa.tensor_scalar(
                    dst=self.high,
                    data=self.static_factor,
                    op0=nl.multiply,
                    operand0=task.lower_bound,
                    op1=nl.minimum,
                    operand1=task.fp8_max,
                )
                nisa.tensor_scalar(dst=self.low, data=self.high, op0=nl.multiply, operand0=-1.0)


def number_buffers():
    """Return what :class:`RowNumbers` needs in SBUF."""
    pmax = nl.tile_size.pmax
    numbers = nl.ndarray((pmax, 6), dtype=nl.float32, buffer=nl.sbuf)
    masks = nl.ndarray((pmax, 2), dtype=nl.int32, buffer=nl.sbuf)
    return [numbers, masks]


class RowNumbers(nl.NKIObject):
    """One number per row, one row to a partition: from a row's sum of squares and peak to its scale.

    Attributes, all ``[rows, 1]`` fp32 but for the last two:
        sum_squares: of the row; without a norm the sum of its elements times 0, which is 0 or NaN.
        inverse_rms: rsqrt(mean square + eps); 1 without a norm.
        inverse_over_max: inverse_rms / R.
        peak: max|x * gamma| over the row.
        scale: the row's scale; NaN in an invalid row, one that holds NaN or Inf.
        factor: what times x * gamma is the code's value.
        keep: int32, all bits set; in an invalid row 0. ``codes & keep`` are what a valid row's codes are.
        nan_codes: int32, STATIC: 0; in an invalid row four codes of 0x7F.
    """

    def __init__(self, task: Task, constants: Constants, buffers: list, rows: int):
        numbers, masks = buffers[0][0:rows, :], buffers[1][0:rows, :]
        self.task = task
        self.constants = constants
        self.rows = rows
        self.sum_squares = numbers[:, 0:1]
        self.inverse_rms = numbers[:, 1:2]
        self.inverse_over_max = numbers[:, 2:3]
        self.peak = numbers[:, 3:4]
        self.scale = numbers[:, 4:5]
        self.factor = numbers[:, 5:6]
        self.keep = masks[:, 0:1]
        self.nan_codes = masks[:, 1:2]
        self.zero = constants.zero[0:rows, :]

    def find_norm(self, normalizes: bool):
        """From sum_squares: everything that does not depend on the peak."""
        task, constants, rows = self.task, self.constants, self.rows
        # A comparison with NaN is false. -1 has all bits set.
        nisa.tensor_scalar(
            dst=self.keep,
            data=self.sum_squares,
            op0=nl.less_equal,
            operand0=constants.limit[0:rows, :],
            op1=nl.multiply,
            operand1=-1.0,
        )
        if not normalizes:
            nisa.memset(self.inverse_rms, 1.0)
        elif RSQRT_ON_GPSIMD:
            nisa.tensor_scalar(
                dst=self.inverse_rms,
                data=self.sum_squares,
                op0=nl.multiply,
                operand0=1.0 / task.count,
                op1=nl.add,
                operand1=constants.eps[0:rows, :],
            )
            nisa.tensor_scalar(
                dst=self.inverse_rms,
                data=self.inverse_rms,
                op0=nl.rsqrt,
                operand0=0.0,
                engine=nisa.engine.gpsimd,
            )
        else:
            nisa.tensor_scalar(
                dst=self.inverse_rms,
                data=self.sum_squares,
                op0=nl.minimum,
                operand0=min(LARGEST_FP32, LARGEST_RSQRT / task.shift * task.count),
            )
            nisa.activation(
                dst=self.inverse_rms,
                op=nl.rsqrt,
                data=self.inverse_rms,
                scale=task.shift / task.count,
                bias=constants.eps[0:rows, :],
            )
        root = task.root if normalizes else 1.0
        nisa.activation(
            dst=self.inverse_over_max,
            op=nl.copy,
            data=self.inverse_rms,
            scale=root / task.fp8_max,
            bias=self.zero,
        )
        if root < 1.0:
            nisa.activation(
                dst=self.inverse_rms, op=nl.copy, data=self.inverse_rms, scale=root, bias=self.zero
            )

    def find_static_factor(self):
        """STATIC: factor and the codes of invalid rows."""
        nisa.tensor_scalar(
            dst=self.nan_codes,
            data=self.keep,
            op0=nl.bitwise_xor,
            operand0=-1,
            op1=nl.bitwise_and,
            operand1=NAN_CODES,
        )
        nisa.tensor_scalar(
            dst=self.factor,
            data=self.inverse_rms,
            op0=nl.multiply,
            operand0=self.constants.static_factor[0 : self.rows, :],
        )

    def find_scale(self):
        """From peak: the scale, as it is where the row is valid."""
        task = self.task
        if task.lower_bound == None:
            nisa.tensor_scalar(
                dst=self.scale,
                data=self.peak,
                op0=nl.multiply,
                operand0=self.inverse_over_max,
                op1=nl.maximum,
                operand1=SCALE_FLOOR,
            )
        else:
            nisa.tensor_scalar(
                dst=self.scale,
                data=self.peak,
                op0=nl.multiply,
                operand0=self.inverse_over_max,
                op1=nl.minimum,
                operand1=task.lower_bound / task.fp8_max,
            )
            nisa.tensor_scalar(dst=self.scale, data=self.scale, op0=nl.maximum, operand0=SCALE_FLOOR)

    def find_factor(self):
        """From the scale: factor, of no use in an invalid row, and then NaN for the scale of such a row."""
        nisa.reciprocal(dst=self.factor, data=self.scale)
        nisa.activation(dst=self.factor, op=nl.copy, data=self.factor, scale=self.inverse_rms, bias=self.zero)
        # All bits set are NaN.
        bits = self.scale.view(nl.int32)
        nisa.tensor_scalar(
            dst=bits, data=self.keep, op0=nl.bitwise_xor, operand0=-1, op1=nl.bitwise_or, operand1=bits
        )


def sum_zeros(constants: Constants, gamma: nl.NkiTensor, bank: nl.NkiTensor):
    """``bank [128, 1]`` in PSUM ``= Σ 0 * gamma``, which is 0, or NaN where gamma is not finite.

    Args:
        constants: the owner of scratch.
        gamma: ``[128, n]`` in SBUF, in any order.
        bank: the result, alike on every partition.
    """
    nothing = nl.ndarray(tuple(gamma.shape), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar_reduce(
        dst=nothing,
        data=gamma,
        op0=nl.multiply,
        operand0=0.0,
        reduce_op=nl.add,
        reduce_res=constants.zeros,
    )
    nisa.nc_matmul(dst=bank, stationary=constants.ones, moving=constants.zeros, accumulate=False)


def require_zeros(constants: Constants, bank: nl.NkiTensor):
    """Make the constants' limit NaN where the sum ``[128, 1]`` in PSUM is: every row is invalid."""
    nisa.tensor_tensor(dst=constants.limit, data1=bank, data2=constants.limit, op=nl.add)
