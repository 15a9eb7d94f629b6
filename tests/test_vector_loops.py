"""Counting in machine code of the CPU kernels. Needs no compiler: the code is written by hand."""

import pytest
import vector_loops
from vector_loops import Count, Loop

# A loop over 16 floats a turn around another one, as objdump writes it. A constant, the stack and a second load of the
# same place are no further elements.
LISTING = """
0000000000000010 <float fusedloss::cpu::(anonymous namespace)::scale<float>(float const*, float*, long)>:
      10:\txor    %eax,%eax
      12:\tvbroadcastss 0x1000(%rip),%ymm3        # 2000 <constants>
      20:\tvmovups (%rdi,%rax,4),%ymm0
      25:\tvmovups 0x20(%rdi,%rax,4),%ymm1
      2a:\tvmulps (%rdi,%rax,4),%ymm3,%ymm2
      2f:\tvaddps -0x40(%rsp),%ymm1,%ymm1
      34:\tvmovaps %ymm1,%ymm4
      38:\tvmovups %ymm2,(%rsi,%rax,4)
      3d:\tvmovups %ymm1,0x20(%rsi,%rax,4)
      42:\tadd    $0x10,%rax
      46:\tcmp    %rdx,%rax
      49:\tjne    20 <float fusedloss::cpu::(anonymous namespace)::scale<float>(float const*, float*, long)+0x10>
      4b:\tdec    %rcx
      4e:\tjne    12 <float fusedloss::cpu::(anonymous namespace)::scale<float>(float const*, float*, long)+0x2>
      50:\tret
"""


def test_what_is_counted_in_a_turn_of_the_innermost_loop():
    (body,) = vector_loops.functions(LISTING).values()
    (loop,) = vector_loops.innermost_loops(body)
    assert [address for address, _, _ in loop][:: len(loop) - 1] == [0x20, 0x49]
    assert vector_loops.count(loop) == Count(vectors=7, arithmetic=2, loads=64, stores=64)


@pytest.mark.parametrize("counted", ["loads", "stores"])
def test_the_cost_of_sixteen_elements(counted):
    row = Loop("scaling", r"scale<float>", counted)
    assert vector_loops.best(row, vector_loops.functions(LISTING), 32) == (7, 2)
    assert vector_loops.best(row, vector_loops.functions(LISTING.replace("ymm", "zmm")), 64) == (3.5, 1)


def test_a_function_that_is_not_there_has_no_cost():
    assert vector_loops.best(Loop("other", "other", "loads"), vector_loops.functions(LISTING), 32) is None


def test_the_readme_has_a_place_for_the_table():
    text = vector_loops.README.read_text()
    start, end = vector_loops.MARKS
    assert text.count(start) == 1
    assert text.index(start) < text.index(end)
