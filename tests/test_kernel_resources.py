"""Counting in machine code, and the verdict on what is counted. Needs no compiler: the code is written by hand."""

import re

import kernel_budget
import kernel_resources
import pytest
import sass
from kernel_budget import Cost, Hot

# Two packets a turn. The second is loaded element by element where it is not whole.
LOOP = """
        MOV R1, c[0x0][0x28]
loop:   ISETP.GE.AND P0, PT, R2, R3, PT
        LDG.E.EF.128 R8, desc[UR4][R4.64]
        @P0 BRA ragged
        LDG.E.EF.128 R12, desc[UR4][R4.64+0x10]
        BRA sums
ragged: LDG.E.U16 R12, desc[UR4][R4.64+0x10]
sums:   FMNMX R6, R8, R6, !PT
        FMNMX R6, R13, R6, !PT
        IADD3 R4, P1, R4, 0x20, RZ
        @!P0 BRA loop
        EXIT
"""


def listing(text, name="kernel"):
    """As cuobjdump writes it: an address for each instruction, and for each label."""
    rows = [re.match(r"(?:(\w+):)?\s*(.*)", line).groups() for line in text.strip().splitlines()]
    addresses = {label: f"{16 * n:#x}" for n, (label, _) in enumerate(rows) if label}
    lines = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for n, (_, code) in enumerate(rows):
        for label, address in addresses.items():
            code = re.sub(rf"\b{label}\b", address, code)
        lines.append(f"        /*{16 * n:04x}*/  {code} ;  /* 0x00000a00ff017b82 */")
        lines.append("                                                      /* 0x000fe20000000a00 */")
    return "\n".join(lines)


def code_of(text):
    return sass.Code(sass.functions(listing(text))["kernel"])


def costs_of(text, stream="read"):
    code = code_of(text)
    path = code.fast_path(code.streams[stream])
    return {"a kernel": {stream: Cost(code.cost(path) / (8 * sass.packets(path)), sass.in_flight(path))}}


def compare(text, **options):
    return kernel_budget.compare(costs_of(text, **options), costs_of(LOOP))


# --- Counting ------------------------------------------------------------------------------------------------------


def test_a_loop_is_counted_on_the_path_of_whole_packets():
    code = code_of(LOOP)
    assert list(code.streams) == ["read"]
    path = code.fast_path(code.streams["read"])
    assert [instruction.address for instruction in path] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x70, 0x80, 0x90, 0xA0]
    assert (code.cost(path), sass.packets(path), sass.in_flight(path)) == (9, 2, 2)


def test_what_a_packet_is_used_for_counts_even_where_a_shorter_path_skips_it():
    skipping = LOOP.replace("sums:   ", "sums:   @P2 BRA next\n        MUFU.EX2 R7, R9\n        ").replace(
        "IADD3", "NOP\nnext:   IADD3"
    )
    assert costs_of(skipping)["a kernel"]["read"].instructions == 12 / 16


@pytest.mark.parametrize(
    ("code", "in_flight"),
    [
        ("LDG.E.128 R8, [R4.64]; LDG.E.128 R12, [R4.64]; FADD R0, R8, R12", 2),
        ("LDG.E.128 R8, [R4.64]; FADD R0, R11, R0; LDG.E.128 R12, [R4.64]; FADD R0, R12, R0", 1),
        # Written to, not read: no wait. An address, and data that is stored, are read.
        ("LDG.E.128 R8, [R4.64]; MOV R8, R1; LDG.E.128 R12, [R4.64]; LDG.E R0, [R14.64]", 2),
        ("LDG.E.128 R8, [R4.64]; LDG.E.128 R12, [R4.64]; STS.128 [R5], R8", 2),
        ("LDG.E.128 R8, [R4.64]; STS [R5], R9; LDG.E.128 R12, [R4.64]; STS [R5], R12", 1),
        # For the next turn: three loads, and a wait for the one of the turn before.
        ("FADD R0, R8, R0; LDG.E.128 R8, [R4.64]; LDG.E.128 R12, [R4.64]; LDG.E.128 R16, [R4.64]", 3),
        # A wait for something else comes between copies too.
        ("LDG.E.64 R2, [R4.64]; ISETP.NE P0, PT, R2, R7, PT; LDGSTS.E.BYPASS.128 [R6], [R4.64]", 1),
        ("LDGSTS.E.BYPASS.128 [R6], [R4.64]; IADD3 R6, R6, 0x10, RZ", None),
        ("LDS.128 R8, [R6]; FADD R0, R8, R0; STG.E.128 [R4.64], R8", None),
    ],
)
def test_loads_in_flight(code, in_flight):
    instructions = sass.functions(listing("\n".join(code.split("; "))))["kernel"]
    assert sass.in_flight(instructions) == in_flight


def test_loops_are_known_by_what_they_do():
    code = code_of("""
row:    MOV R0, R1
copy:   LDGSTS.E.BYPASS.128 [R6], desc[UR4][R4.64]
        @P0 BRA copy
        LDGDEPBAR
        LDS.U16 R10, [R6]
        MUFU.EX2 R10, R10
        @P1 BRA merged
merge:  SHFL.BFLY PT, R5, R4, R3, 0x1f
        @P0 BRA merge
merged: NOP
write:  LDS.128 R8, [R6]
        STG.E.EF.128 desc[UR4][R4.64], R8
        @P0 BRA write
fill:   STG.E.EF.128 desc[UR4][R4.64], R8
        @P0 BRA fill
        @P0 BRA row
        EXIT
""")
    assert {name: loop.depth for name, loop in code.streams.items()} == {"copy": 1, "write": 1, "fill": 1}
    outer = code.around(code.streams["copy"])
    assert code.cost(code.around_path(outer, r"LDS\.U16|MUFU")) == 7  # without the merging, which may be passed by
    assert code.cost(code.around_path(outer, "SHFL")) == 9


@pytest.mark.parametrize(("size", "bytes_"), [(".128", 16), ("", 4)])
def test_packets_that_wait_in_shared_memory_are_gone_over_there(size, bytes_):
    text = f"""
item:   LDG.E.64 R2, desc[UR4][R4.64]
copy:   @!PT LDS RZ, [RZ]
        LDGSTS.E{size} [R6], desc[UR4][R4.64]
        @P0 BRA copy
max:    LDS{size} R8, [R6]
        FMNMX R1, R8, R1, !PT
        @P0 BRA max
sum:    LDS{size} R8, [R6]
        MUFU.EX2 R8, R8
        @P0 BRA sum
change: LDS{size} R8, [R6]
        MUFU.EX2 R8, R8
        STS{size} [R6], R8
        @P0 BRA change
write:  LDS{size} R8, [R6]
        STG.E.EF{size} desc[UR4][R4.64], R8
        @P0 BRA write
        @P1 BRA item
        EXIT
"""
    code = sass.Code(sass.functions(listing(text))["kernel"], bytes_)
    assert list(code.streams) == ["copy", "max", "sum", "change", "write"]
    assert [code.cost(code.fast_path(loop)) for loop in code.streams.values()] == [3, 3, 3, 4, 3]
    assert all(sass.packets(code.fast_path(loop), bytes_) == 1 for loop in code.streams.values())
    assert code.cost(code.around_path(code.around(code.streams["sum"]))) == 2


def test_what_few_turns_do_counts_with_its_share():
    code = code_of("""
tile:   MOV R0, R1
        MOV R0, R1
row:    LDS.U16 R10, [R6]
        MUFU.EX2 R10, R10
        @P1 BRA next
        DADD R2, R2, R4
        DADD R2, R2, R6
next:   @P0 BRA row
        @P2 BRA tile
        EXIT
""")
    work = r"MUFU\.EX2"
    assert kernel_budget.cost_of(Hot("row", 2, work), code, 2) == Cost(4 / 2, None)
    assert kernel_budget.cost_of(Hot("row", 2, work, "DADD"), code, 2) == Cost(6 / 2, None)
    assert kernel_budget.cost_of(Hot("row", 2, work, "DADD", every=4), code, 2) == Cost(4.5 / 2, None)
    assert kernel_budget.cost_of(Hot("tile", 1, work), code, 2) == Cost(3, None)
    with pytest.raises(sass.Unreadable):
        code.busiest("FADD")


def test_a_subroutine_counts_where_it_is_called():
    code = code_of("""
loop:   CALL.REL.NOINC any
        STG.E.U16 desc[UR4][R4.64], R8
        @P0 BRA loop
        EXIT
any:    @P1 BRA none
        LDG.E.U8 R8, desc[UR4][R2.64]
none:   MOV R9, 0x0
        RET.REL.NODEC R20 0x0
""")
    assert code.cost(code.around_path(code.elements, "STG")) == 3 + 4


@pytest.mark.parametrize("code", ["BRX R2 -0x10", "BRA 0x770", "BSSY B0, 0x0\nBSYNC B0\nEXIT"])
def test_what_the_rules_do_not_know_is_no_number(code):
    with pytest.raises(sass.Unreadable):
        code_of(code)


# --- Verdicts ------------------------------------------------------------------------------------------------------


def test_what_has_not_changed_passes(capsys):
    assert compare(LOOP) == ([], [])
    assert kernel_resources.verdict(costs_of(LOOP), "13.0.88", "13.0.88", costs_of(LOOP))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("FMNMX R6, R13", "NOP\n        FMNMX R6, R13"), "0.625 instructions a logit, the table has 0.5625"),
        # The use of the first packet between the loads.
        (("@P0 BRA ragged", "FMNMX R6, R8, R6, !PT\n @P0 BRA ragged"), "1 loads in flight, the table has 2"),
    ],
)
def test_what_got_worse_is_refused(change, complaint, capsys):
    text = LOOP.replace(*change)
    worse, better = compare(text)
    assert any(complaint in line for line in worse)
    assert not better
    assert not kernel_resources.verdict(costs_of(text), "13.0.88", "13.0.88", costs_of(LOOP))
    assert "REFUSED: a kernel: read: " in capsys.readouterr().out


def test_what_got_better_asks_for_a_tighter_table(capsys):
    better = LOOP.replace("        FMNMX R6, R13, R6, !PT\n", "")
    assert compare(better) == ([], ["a kernel: read: 0.5 instructions a logit, the table has 0.5625"])
    assert not kernel_resources.verdict(costs_of(better), "13.0.88", "13.0.88", costs_of(LOOP))
    out = capsys.readouterr().out
    assert "BETTER: a kernel: read: " in out
    assert "--update" in out


def test_copies_that_nothing_waits_for_are_the_most_in_flight():
    def at(in_flight):
        return {"a kernel": {"copy": Cost(1, in_flight)}}

    assert len(kernel_budget.compare(at(1), at(None))[0]) == 1
    assert len(kernel_budget.compare(at(None), at(1))[1]) == 1


def test_a_kernel_or_a_loop_that_is_gone_or_new_is_refused():
    assert kernel_budget.compare({}, costs_of(LOOP))[0] == ["a kernel: read: is in the table, and was not found"]
    assert kernel_budget.compare(costs_of(LOOP), {})[0] == ["a kernel: read: is not in the table"]


def test_one_more_loop_over_packets_is_refused_however_cheap():
    """It might be one more pass over the memory, and the numbers are those of one loop."""
    once, twice = ({"a kernel": {"read": Cost(instructions, 2, loops)}} for instructions, loops in ((9, 1), (3, 2)))
    assert kernel_budget.compare(twice, once) == (["a kernel: read: 2 loops over packets, the table has 1"], [])
    assert kernel_budget.compare(once, twice)[0] == ["a kernel: read: 1 loops over packets, the table has 2"]


def test_the_streaming_loops_of_a_purpose_are_counted():
    again = LOOP.replace("loop", "again").replace("ragged", "uneven").replace("sums", "total")
    assert code_of(LOOP).purposes == {"read": 1}
    assert code_of(LOOP.replace("        EXIT\n", "") + again).purposes == {"read": 2}


@pytest.mark.parametrize("nvcc", ["13.1.80", "13.0.89"])
def test_another_compiler_is_not_judged(nvcc, capsys):
    worse = costs_of(LOOP.replace("IADD3", "NOP\n IADD3"))
    assert kernel_resources.verdict(worse, nvcc, "13.0.88", costs_of(LOOP))
    assert "nothing is judged" in capsys.readouterr().out


@pytest.mark.parametrize(("ci", "passes"), [("true", False), ("", True)])
def test_without_a_disassembler_or_objects_only_ci_fails(ci, passes, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(sass, "disassembler", lambda: None)
    assert kernel_resources.check_machine_code(tmp_path, update=False) == passes
    monkeypatch.setattr(sass, "disassembler", lambda: "cuobjdump")
    assert kernel_resources.check_machine_code(tmp_path, update=False) == passes
    without_tool, without_objects = capsys.readouterr().out.splitlines()
    assert "no cuobjdump was found" in without_tool
    assert "no objects were found" in without_objects


# --- The table and the README --------------------------------------------------------------------------------------


def test_the_table_has_the_kernels_that_are_looked_at(tmp_path):
    nvcc, costs = kernel_budget.load()
    assert list(costs) == list(kernel_budget.KERNELS)
    for name, loops in costs.items():
        assert list(loops) == [hot.stream for hot in kernel_budget.KERNELS[name].loops]
    kernel_budget.save(nvcc, costs, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == kernel_budget.TABLE.read_text()


def test_the_readme_shows_the_table():
    readme = kernel_budget.README.read_text()
    nvcc, costs = kernel_budget.load()
    rows = kernel_budget.markdown(costs)
    assert rows in readme, "run python tools/kernel_resources.py build/build.log --update"
    assert kernel_budget.between(readme, rows) == readme
    assert f"nvcc {'.'.join(nvcc.split('.')[:2])} writes for {sass.ARCH}" in readme
    for name, gpu in kernel_budget.GPUS.items():
        assert f"{name} at {gpu.bytes_per_second / 1e12} TB/s" in readme
        assert f"{gpu.multiprocessors} multiprocessors" in readme
        assert f"at {gpu.hertz / 1e9} GHz" in readme


def test_what_a_gpu_has_time_for():
    room = {name: round(gpu.instructions_per_byte(), 1) for name, gpu in kernel_budget.GPUS.items()}
    assert room == {"H100": 10.4, "H200": 7.3}


# --- The compiler's log --------------------------------------------------------------------------------------------

LOG = """
ptxas info    : Compiling entry function '{name}' for 'sm_90'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stack} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 42 registers, used 1 barriers{shared}
ptxas info    : Compile time = 28.224 ms
"""


def test_the_log_tells_registers_spills_and_shared_memory():
    log = LOG.format(name="one", stack=0, shared=", 528 bytes smem") + LOG.format(name="two", stack=8, shared="")
    one, two = kernel_resources.read(log)
    assert (one.registers, one.stack, one.shared) == (42, 0, 528)
    assert (two.registers, two.stack, two.shared) == (42, 8, 0)
    assert kernel_resources.check_registers([one])
    assert not kernel_resources.check_registers([one, two])
    assert kernel_resources.check_shared_memory([one, two], 528)
    assert kernel_resources.check_shared_memory([one, two], None)
    assert not kernel_resources.check_shared_memory([one, two], 527)


def test_the_limit_of_static_shared_memory():
    limit = kernel_resources.static_shared_limit
    assert limit("struct Device {};") is None
    assert limit("inline constexpr std::size_t kStaticSharedBytes = 4096;") == 4096
    assert limit("constexpr std::size_t kStaticShared = 4 * 1024;  // the most") == 4096
    with pytest.raises(SystemExit, match="kStaticShared"):
        limit("constexpr auto kStaticSharedBytes = bytes();")
