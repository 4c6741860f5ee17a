"""The norm kernel's schedule for many rows of 16-bit floats: the products with gamma are TensorE's.

Rows come transposed, a chunk of 128 columns to the partitions. Such a chunk is the stationary operand of
three kinds of matmul, all of which leave a tile's rows on the partitions of PSUM in fp32:

* against itself: row i meets row i on the diagonal, the sum of squares;
* against a diagonal matrix of gamma: x * gamma, which VectorE reads for the row's largest magnitude ...
* ... and, made a second time when the row's scale is known, ScalarE turns into codes.

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

GROUP = 4  # chunks in flight together: their products fill a PSUM bank
SUM_BUFFERS = 6  # groups of residual_out on their way out: a store takes 2 us and more
LOAD_GROUPS = 2  # groups loaded together: a queue issues a transfer in 0.6 us
STORE_GROUPS = 2  # groups of codes stored together
STAGES = 6  # steps from a tile's last group measured until its scales are there
FINISH_BEHIND = 3  # groups: VectorE does not wait for ScalarE
VECTOR_SHARE = 3  # with no tile left to measure, VectorE quantizes one group of so many
TILES = 8  # at most in SBUF
SBUF_RESERVE = 8192  # bytes per partition for everything that is not as long as a row


def quantize_transposed(task: Task):
    """Quantize the task's rows; hidden is bf16 or fp16, and there is no pre-norm."""
    prefill = Prefill(task)
    prefill.prepare_gamma()
    prefill.run()


class Prefill(nl.NKIObject):
    """What the tiles share.

    Attributes:
        task, constants: see :mod:`.rms_norm_quant_rows`.
        chunks: K, pieces of 128 columns; the last may be smaller.
        groups: pieces of GROUP chunks.
        identity: ``[128, 128]`` bf16.
        on_diagonal: ``[128, 128]`` uint8, 1 on the diagonal.
        diagonals: of each part of gamma ``[128, K * 128]``: chunk k is the diagonal matrix of its columns.
            An fp32 gamma has two bf16 parts, whose sum has 16 significant bits.
        grams: ``[128, 128]`` in PSUM, for tiles in turn.
        products: groups of products in PSUM, used in turn.
        in_flight: tiles in SBUF at a time.
        delay: steps from measuring a group to quantizing it.
        staged: whether the delay leaves a step for each stage of a tile's numbers.
    """

    def __init__(self, task: Task):
        pmax = nl.tile_size.pmax
        self.task = task
        self.constants = Constants(task)
        self.chunks = (task.width + pmax - 1) // pmax
        self.groups = (self.chunks + GROUP - 1) // GROUP
        self.inputs = [task.hidden]
        if task.residual != None:
            self.inputs = [task.hidden, task.residual]
        self.identity = nl.ndarray((pmax, pmax), dtype=nl.bfloat16, buffer=nl.sbuf)
        self.on_diagonal = nl.ndarray((pmax, pmax), dtype=nl.uint8, buffer=nl.sbuf)
        make_identity(self.identity)
        nisa.tensor_copy(dst=self.on_diagonal, src=self.identity)
        self.no_column = nl.ndarray((pmax, 1), dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.memset(self.no_column, 0.0)
        self.diagonals = []  # type: list
        self.grams = []  # type: list
        for _ in range(2):
            self.grams.append(nl.ndarray((pmax, pmax), dtype=nl.float32, buffer=nl.psum))
        self.products = []  # type: list
        for _ in range(nl.tile_size.psum_num_banks - len(self.grams)):
            self.products.append(nl.ndarray((pmax, GROUP * pmax), dtype=nl.float32, buffer=nl.psum))
        self.turn = 0
        self.magnitudes = nl.ndarray((pmax, GROUP * pmax), dtype=nl.bfloat16, buffer=nl.sbuf)
        self.squares = nl.ndarray((pmax, GROUP * pmax), dtype=nl.bfloat16, buffer=nl.sbuf)
        self.diagonal_only = nl.ndarray((pmax, pmax), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(self.diagonal_only, 0.0)
        self.scaled, self.sums = [], []  # type: list, list
        for _ in range(2):
            if task.static_scale != None or task.lower_bound != None:
                self.scaled.append(nl.ndarray((pmax, GROUP * pmax), dtype=nl.float32, buffer=nl.sbuf))
        if task.residual != None:
            for _ in range(SUM_BUFFERS):
                self.sums.append(nl.ndarray((pmax, GROUP * pmax), dtype=task.hidden.dtype, buffer=nl.sbuf))
        self.transposed, self.packed, self.numbers = [], [], []  # type: list, list, list
        self.in_flight, self.delay, self.staged = 0, 0, False
        self.load_groups, self.finish_behind = 0, 0

    def prepare_gamma(self):
        """Make the diagonal matrices. VectorE, which has nothing else to do yet, makes the first group."""
        task, pmax = self.task, nl.tile_size.pmax
        if task.gamma == None:
            return
        columns = nl.ndarray((pmax, self.chunks), dtype=nl.float32, buffer=nl.sbuf)
        load_chunks_as_columns(columns, task.gamma, self.grams[1].view(task.gamma.dtype))
        self.gamma_columns = columns
        parts = [columns]
        dtype = nl.float16 if task.gamma.dtype == nl.float16 else nl.bfloat16
        if task.gamma.dtype == nl.float32:
            rounded = nl.ndarray((pmax, self.chunks), dtype=nl.bfloat16, buffer=nl.sbuf)
            rest = nl.ndarray((pmax, self.chunks), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=rounded, src=columns)
            nisa.tensor_tensor(dst=rest, data1=columns, data2=rounded, op=nl.subtract)
            parts = [columns, rest]
        for part in parts:
            diagonal = nl.ndarray((pmax, self.chunks * pmax), dtype=dtype, buffer=nl.sbuf)
            for k in range(self.chunks):
                chunk, scale = diagonal[:, k * pmax : (k + 1) * pmax], part[:, k : k + 1]
                if k < GROUP:
                    nisa.tensor_scalar(dst=chunk, data=self.identity, op0=nl.multiply, operand0=scale)
                else:
                    nisa.activation(
                        dst=chunk, op=nl.copy, data=self.identity, scale=scale, bias=self.constants.zero
                    )
            self.diagonals.append(diagonal)

    def next_products(self):
        """Return the next of the buffers in PSUM, ``[128, GROUP * 128]`` fp32."""
        self.turn += 1
        return self.products[self.turn % len(self.products)]

    def allocate_tiles(self):
        """Make the buffers that tiles use in turn, as many as SBUF has room for."""
        task, pmax = self.task, nl.tile_size.pmax
        pitch = (task.width + SCALE_BYTES + 3) // 4 * 4
        row_bytes = self.chunks * pmax * 2
        spent = SBUF_RESERVE + len(self.diagonals) * row_bytes
        spent += GROUP * pmax * (4 + 4 * len(self.scaled) + 2 * len(self.sums))
        each = len(self.inputs) * row_bytes + pitch
        room = nl.tile_size.sbuf_fmax_bytes - spent
        self.in_flight = min(TILES, room // each)
        # A group is quantized before the load that overwrites it is issued.
        self.delay = min(self.groups + STAGES, self.in_flight * self.groups)
        self.staged = self.delay == self.groups + STAGES
        # A load must not overwrite what is not yet quantized.
        self.load_groups = LOAD_GROUPS if self.in_flight > 1 else 1
        self.finish_behind = FINISH_BEHIND if self.in_flight > 1 else 0
        for _ in range(self.in_flight):
            transposed = []
            for source in self.inputs:
                shape = (pmax, self.chunks, pmax)
                transposed.append(nl.ndarray(shape, dtype=source.dtype, buffer=nl.sbuf))
            self.transposed.append(transposed)
            packed = nl.ndarray((pmax, pitch), dtype=nl.uint8, buffer=nl.sbuf)
            if pitch > task.width + SCALE_BYTES or task.static_scale != None:
                nisa.memset(packed.view(nl.int32)[:, pitch // 4 - 2 : pitch // 4], 0)
            self.packed.append(packed)
            self.numbers.append(number_buffers())

    def run(self):
        """Quantize all rows, a group at a time: measured first, quantized when the row's scale is there.

        Every engine runs its instructions in order. What waits for another engine is therefore issued a
        group later than what it waits for, so that few engines ever wait.
        """
        self.allocate_tiles()
        task, pmax, groups = self.task, nl.tile_size.pmax, self.groups
        steps = (task.last - task.first + pmax - 1) // pmax * groups
        tiles = []  # type: list
        done = 0
        ready = 0  # groups of the tiles whose scales are there
        for step in range(steps + STAGES + 1):
            index, group = step // groups, step % groups
            # Beside the last tile ScalarE catches up with the one before; after it, it does what is left.
            until = step + 1 - self.delay
            if step >= steps:
                until = ready
            elif step >= steps - groups:
                until = min(done + 2, max(until, ready))
            while done < until:
                tiles[done // groups].quantize(done % groups, step >= steps)
                done += 1
                if done > self.finish_behind:
                    finished = done - self.finish_behind - 1
                    tiles[finished // groups].finish(finished % groups)
            if step < steps:
                if group == 0:
                    tiles.append(Tile(self, index))
                tiles[index].measure(group)
                if step == groups - 1 and task.gamma != None:
                    zeros = self.next_products()[:, 0:1]
                    sum_zeros(self.constants, self.gamma_columns, zeros)
                    require_zeros(self.constants, zeros)
            for turn in range(STAGES):
                # A step for each stage, the later stage first: it frees what the earlier one writes.
                stage = STAGES - 1 - turn if self.staged else turn
                complete = step + 1 - (stage if self.staged else 0)
                if complete > 0 and complete <= steps and complete % groups == 0:
                    tiles[complete // groups - 1].find_numbers(stage)
                    if stage == STAGES - 1:
                        ready = complete
        for finished in range(max(0, steps - self.finish_behind), steps):
            tiles[finished // groups].finish(finished % groups)


class Tile(nl.NKIObject):
    """Up to 128 rows on their way through the kernel.

    Attributes:
        first, last: which rows, ``first <= row < last``; rows: how many.
        transposed: of each input ``[128, K, rows]``: chunk k holds columns 128 k and on, rows last.
        packed: ``[rows, H + 4]`` uint8, codes and scale; its pitch is a multiple of four bytes.
        numbers: the :class:`RowNumbers`.
    """

    def __init__(self, prefill: Prefill, index: int):
        task, pmax = prefill.task, nl.tile_size.pmax
        self.prefill = prefill
        self.task = task
        self.first = task.first + index * pmax
        self.last = min(self.first + pmax, task.last)
        self.rows = self.last - self.first
        self.transposed = prefill.transposed[index % prefill.in_flight]
        self.packed = prefill.packed[index % prefill.in_flight][0 : self.rows, :]
        buffers = prefill.numbers[index % prefill.in_flight]
        self.numbers = RowNumbers(task, prefill.constants, buffers, self.rows)
        self.gram = prefill.grams[index % 2][0 : self.rows, 0 : self.rows]
        self.stored = 0

    def columns(self, group: int):
        """Return the columns of H in a group: ``first, last``."""
        size = GROUP * nl.tile_size.pmax
        return group * size, min((group + 1) * size, self.task.width)

    def load(self, group: int):
        """Bring groups to SBUF, transposed by the DMA engines."""
        pmax = nl.tile_size.pmax
        start = self.columns(group)[0]
        stop = min(start + self.prefill.load_groups * GROUP * pmax, self.task.width)
        first = start // pmax
        whole = (stop - start) // pmax
        middle = start + whole * pmax
        for i in range(len(self.transposed)):
            source = self.prefill.inputs[i][self.first : self.last, :]
            dst = self.transposed[i]
            if whole > 0:
                nisa.dma_transpose(
                    dst=dst[:, first : first + whole, 0 : self.rows],
                    src=source[:, start:middle].reshape_dim(1, (whole, pmax)),
                    axes=(2, 1, 0),
                )
            if middle < stop:
                nisa.dma_transpose(
                    dst=dst[0 : stop - middle, first + whole, 0 : self.rows],
                    src=source[:, middle:stop],
                    axes=(1, 0),
                )

    def multiply(self, group: int, matrices: list):
        """Return ``[rows, n]`` in PSUM: a group's columns of every input times each matrix, summed.

        Args:
            group: which columns.
            matrices: ``[128, K * 128]`` each, or ``[128, 128]`` for all chunks.
        """
        prefill, pmax = self.prefill, nl.tile_size.pmax
        start, stop = self.columns(group)
        products = prefill.next_products()[0 : self.rows, 0 : stop - start]
        for column in range(start, stop, pmax):
            used = min(pmax, stop - column)
            first = True
            for x in self.transposed:
                for matrix in matrices:
                    at = column if matrix.shape[1] > pmax else 0
                    nisa.nc_matmul(
                        dst=products[:, column - start : column - start + used],
                        stationary=x[0:used, column // pmax, 0 : self.rows],
                        moving=matrix[0:used, at : at + used],
                        accumulate=not first,
                    )
                    first = False
        return products

    def weighted(self, group: int):
        """Return x * gamma of a group, ``[rows, n]`` in PSUM."""
        if self.task.gamma == None:
            return self.multiply(group, [self.prefill.identity])
        return self.multiply(group, self.prefill.diagonals)

    def measure(self, group: int):
        """First half, one group: its part of the sum of squares and of the peak."""
        if group % self.prefill.load_groups == 0:
            self.load(group)
        if self.task.residual != None:
            self.add_residual(group)
        if self.task.static_scale == None:
            products = self.weighted(group)
            accumulate_peak(
                self.prefill.magnitudes[0 : self.rows, 0 : products.shape[1]],
                products,
                self.numbers.peak,
                group == 0,
                group == self.prefill.groups - 1,
            )
        if self.task.residual == None:
            self.add_to_gram(group)

    def add_to_gram(self, group: int):
        """Add a group's share to the rows' products with one another; only the diagonal counts."""
        prefill, pmax = self.prefill, nl.tile_size.pmax
        start, stop = self.columns(group)
        gram = self.gram
        for column in range(start, stop, pmax):
            used = min(pmax, stop - column)
            x = self.transposed[0][0:used, column // pmax, 0 : self.rows]
            if self.task.gamma == None:
                nisa.nc_matmul(
                    dst=gram[:, 0:1], stationary=x, moving=prefill.no_column[0:used, :], accumulate=column > 0
                )
            else:
                nisa.nc_matmul(dst=gram, stationary=x, moving=x, accumulate=column > 0)

    def add_residual(self, group: int):
        """hidden + residual of a group: round and store it; add its squares up."""
        prefill, task = self.prefill, self.task
        start, stop = self.columns(group)
        total = self.multiply(group, [prefill.identity])
        squares = prefill.squares[0 : self.rows, 0 : stop - start]
        nisa.activation(
            dst=squares,
            op=nl.copy if task.gamma == None else nl.square,
            data=total,
            scale=0.0 if task.gamma == None else 1.0,
            bias=self.numbers.zero,
            reduce_op=nl.add,
            reduce_res=self.numbers.sum_squares if stop == task.width else None,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if group == 0 else nisa.reduce_cmd.reduce,
        )
        rounded = prefill.sums[group % SUM_BUFFERS][0 : self.rows, 0 : stop - start]
        nisa.tensor_copy(dst=rounded, src=total, engine=nisa.engine.vector)
        nisa.dma_copy(dst=task.residual_out[self.first : self.last, start:stop], src=rounded)

    def find_numbers(self, stage: int):
        """The numbers of each row, once every group is measured: a stage for every wait of one engine."""
        prefill, numbers, rows = self.prefill, self.numbers, self.rows
        sums_itself = self.task.residual != None
        diagonal = prefill.diagonal_only[0:rows, 0:rows]
        if stage == 0 and not sums_itself and self.task.gamma == None:
            nisa.tensor_copy(dst=numbers.sum_squares, src=self.gram[:, 0:1])
        elif stage == 0 and not sums_itself:
            on_diagonal = prefill.on_diagonal[0:rows, 0:rows]
            nisa.tensor_copy_predicated(dst=diagonal, src=self.gram, predicate=on_diagonal)
        elif stage == 1 and not sums_itself and self.task.gamma != None:
            nisa.tensor_reduce(dst=numbers.sum_squares, op=nl.add, data=diagonal, axis=1)
        elif stage == 2:
            numbers.find_norm(self.task.gamma != None)
        elif stage == 4 and self.task.static_scale != None:
            numbers.find_static_factor()
        elif stage == 4:
            numbers.find_scale()
        elif stage == 5 and self.task.static_scale == None:
            numbers.find_factor()

    def quantize(self, group: int, vector_helps: bool):
        """Second half, one group: its codes; VectorE is a group behind, and helps once no tile is left."""
        task, prefill = self.task, self.prefill
        start, stop = self.columns(group)
        products = self.weighted(group)
        codes = self.packed.view(task.fp8)[:, start:stop]
        if len(prefill.scaled) > 0:
            scaled = prefill.scaled[group % 2][0 : self.rows, 0 : stop - start]
            nisa.activation(
                dst=scaled, op=nl.copy, data=products, scale=self.numbers.factor, bias=self.numbers.zero
            )
            high, low = task.high, -task.high
            if task.static_scale != None and task.lower_bound != None:
                high, low = prefill.constants.high[0 : self.rows, :], prefill.constants.low[0 : self.rows, :]
            nisa.tensor_scalar(
                dst=codes, data=scaled, op0=nl.minimum, operand0=high, op1=nl.maximum, operand1=low
            )
        elif vector_helps and group % VECTOR_SHARE == VECTOR_SHARE - 1:
            nisa.tensor_scalar(dst=codes, data=products, op0=nl.multiply, operand0=self.numbers.factor)
        else:
            nisa.activation(
                dst=codes, op=nl.copy, data=products, scale=self.numbers.factor, bias=self.numbers.zero
            )

    def finish(self, group: int):
        """Codes of invalid rows as the contract has them; the scale behind the last; store."""
        task = self.task
        last = group == self.prefill.groups - 1
        start, stop = self.columns(group)
        words = self.packed.view(nl.int32)[:, start // 4 : (stop + 3) // 4]
        if task.static_scale == None:
            nisa.tensor_scalar(dst=words, data=words, op0=nl.bitwise_and, operand0=self.numbers.keep)
        else:
            nisa.tensor_scalar(
                dst=words,
                data=words,
                op0=nl.bitwise_and,
                operand0=self.numbers.keep,
                op1=nl.bitwise_or,
                operand1=self.numbers.nan_codes,
            )
        if last and task.static_scale == None:
            nisa.tensor_copy(
                dst=self.packed[:, stop : stop + SCALE_BYTES],
                src=self.numbers.scale.view(nl.uint8),
                engine=nisa.engine.gpsimd,
            )
            stop += SCALE_BYTES
        if last or group % STORE_GROUPS == STORE_GROUPS - 1:
            codes = self.packed[:, self.stored : stop]
            if task.out.dtype != nl.uint8:
                codes = codes.view(task.out.dtype)
            nisa.dma_copy(dst=task.out[self.first : self.last, self.stored : stop], src=codes)
            self.stored = stop


def accumulate_peak(scratch: nl.NkiTensor, data: nl.NkiTensor, peak: nl.NkiTensor, first: bool, last: bool):
    """``peak [P, 1] = max|data|`` over the calls from the first to the last; data, scratch ``[P, n]``."""
    nisa.tensor_scalar_reduce(
        dst=scratch,
        data=data,
        op0=nl.abs,
        operand0=0.0,
        reduce_op=nl.maximum,
        reduce_res=peak if last else None,
        reduce_cmd=nisa.reduce_cmd.reset_reduce if first else nisa.reduce_cmd.reduce,
    )


def make_identity(dst: nl.NkiTensor):
    """Make ``dst [n, n]`` in SBUF the identity."""
    n = dst.shape[0]
    ones = nl.ndarray((n, n), dtype=dst.dtype, buffer=nl.sbuf)
    nisa.memset(ones, 1.0)
    nisa.affine_select(
        dst=dst,
        pattern=[[-1, n]],
        channel_multiplier=1,
        on_true_tile=ones,
        on_false_value=0.0,
        cmp_op=nl.equal,
    )


def load_chunks_as_columns(dst: nl.NkiTensor, gamma: nl.NkiTensor, bank: nl.NkiTensor):
    """``dst [128, K]`` fp32 ``= gamma [1, H]``, chunk k of 128 elements in column k; 0 after the last.

    ``bank`` is ``[128, >= K]`` in PSUM, of gamma's dtype.
    """
    pmax, width = nl.tile_size.pmax, gamma.shape[1]
    whole, rest = width // pmax, width % pmax
    if rest > 0:
        nisa.memset(dst[:, whole : whole + 1], 0.0)
        tail = nl.ndarray((rest, 1), dtype=gamma.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tail, src=gamma[:, whole * pmax : width].reshape((rest, 1)))
        nisa.tensor_copy(dst=dst[0:rest, whole : whole + 1], src=tail, engine=nisa.engine.vector)
    if whole > 0:
        chunks = nl.ndarray((whole, pmax), dtype=gamma.dtype, buffer=nl.sbuf)
        turned = bank[:, 0:whole]
        nisa.dma_copy(dst=chunks, src=gamma[:, 0 : whole * pmax].reshape((whole, pmax)))
        nisa.nc_transpose(dst=turned, data=chunks, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=dst[:, 0:whole], src=turned, engine=nisa.engine.vector)
