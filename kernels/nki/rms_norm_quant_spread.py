"""The norm kernel's schedule for few rows, and for what the other does not take (fp32, a pre-norm).

A row is spread over all partitions, J of its columns on each: ``[128, rows, J]``. Every lane works however
few the rows are. The partitions' sums and maxima are transposed, and then there is one row to a partition,
as :class:`RowNumbers` has it; its numbers go back to all partitions by transposes. A transpose is exact, and
so a row's result does not depend on the rows beside it.

docs/kernels/rms_norm_quant.md has the figures.
"""

try:
    import nki.isa as nisa
    import nki.language as nl
except ModuleNotFoundError:  # no Neuron SDK: the simulator's namespace
    from .simulator.nki import isa as nisa
    from .simulator.nki import language as nl

from .common import SCALE_BYTES
from .rms_norm_quant_rows import Constants, RowNumbers, Task, number_buffers, require_zeros, sum_zeros

MANY_ROWS = 32  # rows of a block where there are several blocks, two of them in SBUF
FEW_ROWS = 64  # rows of a single block


def quantize_spread(task: Task):
    """Quantize the task's rows."""
    spread = Spread(task)
    count = task.last - task.first
    for index in range((count + spread.block_rows - 1) // spread.block_rows):
        block = Block(spread, index)
        block.load()
        block.normalize()
        block.quantize()
        block.store()


class Spread(nl.NKIObject):
    """What the blocks share.

    Attributes:
        task, constants: see :mod:`.rms_norm_quant_rows`.
        columns: J.
        whole: partitions that hold J columns; rest: how many the one after them holds.
        gamma, pre_gamma: ``[128, J]``, 0 beyond H; None where there is no such norm.
        block_rows: rows of a block; buffers: blocks in SBUF.
    """

    def __init__(self, task: Task):
        pmax = nl.tile_size.pmax
        self.task = task
        self.constants = Constants(task)
        self.columns = (task.width + pmax - 1) // pmax
        self.whole = task.width // self.columns
        self.rest = task.width - self.whole * self.columns
        rows = task.last - task.first
        self.block_rows = MANY_ROWS if rows > FEW_ROWS else rows
        self.buffers = 2 if rows > FEW_ROWS else 1
        self.sums, self.peaks, self.factors = self.bank(), self.bank(), self.bank()
        self.keeps, self.nans, self.total = self.bank(), self.bank(), self.bank()
        self.gamma, self.pre_gamma = None, None
        self.blocks = []
        for _ in range(self.buffers):
            self.blocks.append(self.tiles())

    def load_gammas(self):
        """Bring gamma and pre_gamma to SBUF."""
        if self.task.pre_gamma != None:
            self.pre_gamma = self.load_vector(self.task.pre_gamma)
        if self.task.gamma != None:
            self.gamma = self.load_vector(self.task.gamma)

    def bank(self):
        """Return a PSUM bank, ``[128, 512]`` fp32."""
        shape = (nl.tile_size.pmax, nl.tile_size.psum_bank_fmax)
        return nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum)

    def tile(self, dtype):
        """Return ``[128, block_rows, J]`` in SBUF."""
        shape = (nl.tile_size.pmax, self.block_rows, self.columns)
        return nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)

    def tiles(self):
        """Return the buffers of a block: :class:`Buffers`."""
        task = self.task
        sums = task.residual != None or task.pre_gamma != None
        buffers = Buffers()
        buffers.hidden = self.tile(task.hidden.dtype)
        loads = [buffers.hidden]
        buffers.x = buffers.hidden
        if task.residual != None:
            buffers.residual = self.tile(task.hidden.dtype)
            buffers.rounded = self.tile(task.hidden.dtype)
            loads.append(buffers.residual)
        if sums:
            buffers.x = self.tile(nl.float32)
        buffers.scratch = self.tile(nl.float32)
        buffers.product = buffers.x
        if task.gamma != None:
            buffers.product = self.tile(nl.float32)
        buffers.codes = self.tile(nl.uint8)
        buffers.parts = nl.ndarray((nl.tile_size.pmax, 2 * self.block_rows), dtype=nl.float32, buffer=nl.sbuf)
        buffers.numbers, buffers.pre_numbers = number_buffers(), number_buffers()
        # What is beyond H stays 0: it adds nothing to a sum or a maximum.
        if self.whole * self.columns < nl.tile_size.pmax * self.columns:
            for tile in loads:
                nisa.memset(tile, 0.0)
        return buffers

    def load_vector(self, vector: nl.NkiTensor):
        """Return ``vector [1, H]`` as ``[128, J]`` in SBUF."""
        pmax, middle = nl.tile_size.pmax, self.whole * self.columns
        tile = nl.ndarray((pmax, self.columns), dtype=vector.dtype, buffer=nl.sbuf)
        if self.whole < pmax:
            nisa.memset(tile, 0.0)
        nisa.dma_copy(
            dst=tile[0 : self.whole, :], src=vector[:, 0:middle].reshape((self.whole, self.columns))
        )
        if self.rest > 0:
            nisa.dma_copy(
                dst=tile[self.whole : self.whole + 1, 0 : self.rest], src=vector[:, middle : self.task.width]
            )
        return tile


class Buffers(nl.NKIObject):
    """Tiles of a block, ``[128, block_rows, J]``.

    Attributes:
        hidden, residual, rounded: of hidden's dtype; the latter two where there is a residual.
        x: what is normalized: hidden itself or, in fp32, its pre-norm and the residual added.
        product: x * gamma in fp32; x itself without a norm.
        scratch: fp32. codes: uint8.
        parts: ``[128, 2 * block_rows]`` fp32, each partition's sums, then its maxima.
        numbers, pre_numbers: for the :class:`RowNumbers` of the norm and of the pre-norm.
    """

    def __init__(self):
        self.hidden, self.residual, self.rounded, self.x, self.product = None, None, None, None, None
        self.scratch, self.codes, self.parts, self.numbers, self.pre_numbers = None, None, None, None, None


class Block(nl.NKIObject):
    """Some rows on their way through the kernel; ``first <= row < last``."""

    def __init__(self, spread: Spread, index: int):
        task = spread.task
        self.spread = spread
        self.task = task
        self.first = task.first + index * spread.block_rows
        self.last = min(self.first + spread.block_rows, task.last)
        self.rows = self.last - self.first
        rows = self.rows
        buffers = spread.blocks[index % spread.buffers]
        self.buffers = buffers
        self.hidden = buffers.hidden[:, 0:rows, :]
        self.x = buffers.x[:, 0:rows, :]
        self.product = buffers.product[:, 0:rows, :]
        self.scratch = buffers.scratch[:, 0:rows, :]
        self.codes = buffers.codes[:, 0:rows, :]
        self.numbers = RowNumbers(task, spread.constants, buffers.numbers, rows)
        self.pre_numbers = RowNumbers(task, spread.constants, buffers.pre_numbers, rows)

    def move(self, hbm: nl.NkiTensor, tile: nl.NkiTensor, into_sbuf: bool):
        """Copy ``hbm [T, >= H]`` to ``tile [128, rows, J]`` or back."""
        spread = self.spread
        whole, middle = spread.whole, spread.whole * spread.columns
        rows = hbm[self.first : self.last, :]
        there = rows[:, 0:middle].reshape_dim(1, (whole, spread.columns)).permute((1, 0, 2))
        here = tile[0:whole, :, :]
        pairs = [(there, here)]
        if spread.rest > 0:
            there = rows[:, middle : self.task.width].reshape_dim(0, (1, self.rows))
            pairs.append((there, tile[whole : whole + 1, :, 0 : spread.rest]))
        for there, here in pairs:
            if into_sbuf:
                nisa.dma_copy(dst=here, src=there)
            else:
                nisa.dma_copy(dst=there, src=here)

    def load(self):
        """Bring the rows to SBUF: pre-norm, residual added, the sum rounded and stored."""
        task, buffers = self.task, self.buffers
        self.move(task.hidden, self.hidden, True)
        if task.residual != None:
            residual = buffers.residual[:, 0 : self.rows, :]
            self.move(task.residual, residual, True)
        if self.first == task.first:  # what is needed first is loaded first
            self.spread.load_gammas()
        x = self.hidden
        if task.pre_gamma != None:
            self.find_sums(x, self.pre_numbers, task.gamma == None)
            self.pre_numbers.find_norm(True)
            inverse = self.everywhere(self.pre_numbers.inverse_rms, self.spread.factors)
            nisa.tensor_tensor(dst=self.x, data1=x, data2=self.along_row(inverse), op=nl.multiply)
            x = self.x
            nisa.tensor_tensor(
                dst=self.x, data1=x, data2=self.along_rows(self.spread.pre_gamma), op=nl.multiply
            )
        if task.residual != None:
            nisa.tensor_tensor(dst=self.x, data1=x, data2=residual, op=nl.add)
            rounded = buffers.rounded[:, 0 : self.rows, :]
            nisa.activation(dst=rounded, op=nl.copy, data=self.x, bias=self.spread.constants.zero)
            self.move(task.residual_out, rounded, False)

    def normalize(self):
        """The numbers of each row, and the product."""
        task, spread, zero = self.task, self.spread, self.spread.constants.zero
        numbers, rows = self.numbers, self.rows
        checks = task.gamma != None and self.first == task.first
        if task.gamma != None:
            gamma = self.along_rows(spread.gamma)
            nisa.tensor_tensor(dst=self.product, data1=self.x, data2=gamma, op=nl.multiply)
        if checks:
            sum_zeros(spread.constants, spread.gamma, spread.total[:, 0:1])
        self.find_sums(self.x, numbers, task.gamma == None)
        if task.static_scale == None:
            maxima = self.buffers.parts[:, spread.block_rows : spread.block_rows + rows]
            nisa.activation(dst=self.scratch, op=nl.abs, data=self.product, bias=zero)
            nisa.tensor_reduce(dst=maxima, op=nl.maximum, data=self.scratch, axis=2)
            by_row = spread.peaks[0:rows, 0 : nl.tile_size.pmax]
            nisa.nc_transpose(dst=by_row, data=maxima, engine=nisa.engine.tensor)
        if checks:
            require_zeros(spread.constants, spread.total[:, 0:1])
        numbers.find_norm(task.gamma != None)
        if task.pre_gamma != None:
            nisa.tensor_tensor(
                dst=numbers.keep, data1=numbers.keep, data2=self.pre_numbers.keep, op=nl.bitwise_and
            )
        if task.static_scale == None:
            nisa.tensor_reduce(dst=numbers.peak, op=nl.maximum, data=by_row, axis=1)
            numbers.find_scale()
            numbers.find_factor()
        else:
            numbers.find_static_factor()

    def find_sums(self, x: nl.NkiTensor, numbers: RowNumbers, times_zero: bool):
        """Set the numbers' sum_squares, or of elements times 0, to that of ``x [128, rows, J]``."""
        spread, rows = self.spread, self.rows
        sums = self.buffers.parts[:, 0:rows]
        nisa.activation(
            dst=self.scratch,
            op=nl.copy if times_zero else nl.square,
            data=x,
            scale=0.0 if times_zero else 1.0,
            bias=spread.constants.zero,
        )
        nisa.tensor_reduce(dst=sums, op=nl.add, data=self.scratch, axis=2)
        by_row = spread.sums[0:rows, 0 : nl.tile_size.pmax]
        nisa.nc_transpose(dst=by_row, data=sums, engine=nisa.engine.tensor)
        nisa.tensor_reduce(dst=numbers.sum_squares, op=nl.add, data=by_row, axis=1)

    def everywhere(self, number: nl.NkiTensor, bank: nl.NkiTensor):
        """Return ``number [rows, 1]``, 4 bytes each, as ``[128, rows]`` in PSUM, alike on every partition."""
        pmax = nl.tile_size.pmax
        result = bank[:, 0 : self.rows]
        nisa.nc_transpose(
            dst=result, data=number.view(nl.float32).broadcast(1, pmax), engine=nisa.engine.tensor
        )
        return result

    def along_row(self, numbers: nl.NkiTensor):
        """Return ``[128, rows]`` as ``[128, rows, J]``."""
        return numbers.reshape_dim(1, (self.rows, 1)).broadcast(2, self.spread.columns)

    def along_rows(self, vector: nl.NkiTensor):
        """Return ``[128, J]`` as ``[128, rows, J]``."""
        return vector.reshape_dim(1, (1, self.spread.columns)).broadcast(1, self.rows)

    def quantize(self):
        """The codes, those of invalid rows as the contract has them."""
        task, spread = self.task, self.spread
        codes = self.codes.view(task.fp8)
        factor = self.along_row(self.everywhere(self.numbers.factor, spread.factors))
        if task.static_scale == None and task.lower_bound == None:
            nisa.tensor_tensor(dst=codes, data1=self.product, data2=factor, op=nl.multiply)
        else:
            high, low = task.high, -task.high
            if task.static_scale != None and task.lower_bound != None:
                high, low = spread.constants.high, spread.constants.low
            nisa.tensor_tensor(dst=self.scratch, data1=self.product, data2=factor, op=nl.multiply)
            nisa.tensor_scalar(
                dst=codes, data=self.scratch, op0=nl.minimum, operand0=high, op1=nl.maximum, operand1=low
            )
        self.combine(self.numbers.keep, spread.keeps, nl.bitwise_and)
        if task.static_scale != None:
            self.combine(self.numbers.nan_codes, spread.nans, nl.bitwise_or)

    def combine(self, mask: nl.NkiTensor, bank: nl.NkiTensor, op):
        """``codes = codes <op> mask``, of each row the bytes of its ``mask [rows, 1]``."""
        columns, dtype, size = self.spread.columns, nl.int8, 1
        if columns % 4 == 0:
            dtype, size = nl.int32, 4
        elif columns % 2 == 0:
            dtype, size = nl.int16, 2
        masks = self.everywhere(mask, bank).view(dtype).reshape_dim(1, (self.rows, 4 // size))[:, :, 0:1]
        words = self.codes.view(dtype)
        nisa.tensor_tensor(dst=words, data1=words, data2=masks.broadcast(2, columns // size), op=op)

    def store(self):
        """Send codes and scales to HBM."""
        task, width = self.task, self.task.width
        if task.static_scale == None:
            scale = self.numbers.scale.view(task.out.dtype)
            nisa.dma_copy(dst=task.out[self.first : self.last, width : width + SCALE_BYTES], src=scale)
        codes = self.codes.view(task.out.dtype) if task.out.dtype != nl.uint8 else self.codes
        self.move(task.out, codes, False)
