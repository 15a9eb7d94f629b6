"""Each header of csrc compiles alone, and each file includes the standard headers of what it uses.

What torch's or another compiler's headers happen to bring along is gone with their next version.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

CSRC = Path(__file__).parents[1] / "csrc"
HEADERS = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".inl"})
SOURCES = sorted([*HEADERS, *CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")])
PART = re.compile(r"// Part of (\S+)[,:.]")  # begins a file that another includes in its middle
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")
INCLUDE = re.compile(r'#include (["<])([^">]+)[">]')

STANDARD = {  # header: names of std that it defines, as a pattern
    "algorithm": "(all|any|none)_of|adjacent_find|clamp|copy(_n)?|fill(_n)?|find(_if)?|is_sorted|(stable_)?sort"
    "|(max|min)(_element)?|partition_point|transform|(lower|upper)_bound",
    "array": "array",
    "atomic": "atomic",
    "bit": "bit_(cast|ceil|floor|width)|popcount",
    "cmath": "abs|ceil|exp2?|floor|fma|is(finite|inf|nan)|ldexp|log(1p|2)?|pow|sqrt|tanh",
    "cstdint": r"u?int(\d+|ptr)_t",
    "cstring": "mem(cmp|cpy|set)|strlen",
    "exception": "(current_|rethrow_)?exception(_ptr)?|terminate",
    "functional": "function",
    "initializer_list": "initializer_list",
    "limits": "numeric_limits",
    "memory": "(make_)?(shared|unique)(_ptr)?|addressof|weak_ptr",
    "mutex": "(recursive_)?mutex|(lock_guard|scoped_lock|unique_lock)|call_once",
    "numeric": "accumulate|gcd|iota",
    "optional": "(make_)?optional|nullopt",
    "string": "string|to_string",
    "tuple": "(make_)?tuple(_cat)?|apply|ignore|tie",
    "type_traits": r"\w+_v|(conditional|decay|enable_if|remove_\w+|type_identity|underlying_type)_t|bool_constant",
    "unordered_map": "unordered_map",
    "utility": r"exchange|forward|move|(make_)?pair|swap|(make_)?(index|integer)_sequence(_for)?",
    "variant": "get_if|variant|visit",
    "vector": "vector|erase_if",
}


def is_of_torch(path):
    return path.parent.name in ("ops", "csrc")


def is_of_cuda(path):
    """Whether nvcc is needed: for device code, and for what includes CUDA's headers, through others or not."""
    if path.suffix == ".cuh":
        return True
    included = INCLUDE.findall(path.read_text())
    others = ((path.parent / name).resolve() for quote, name in included if quote == '"')
    return any(name.startswith("cuda") for quote, name in included if quote == "<") or any(map(is_of_cuda, others))


def compiled(path, folder):
    """Nothing but the header, parsed; those without torch have no path to it."""
    alone = folder / f"{'_'.join(path.relative_to(CSRC).parts)}.cu"
    alone.write_text(f'#include "{path}"\n')
    if is_of_cuda(path):
        command = [NVCC, "-std=c++20", "--expt-relaxed-constexpr", "-arch=sm_90", "-ptx", "-o", os.devnull, alone]
    else:
        paths = [*cpp_extension.include_paths(), sysconfig.get_path("include")] if is_of_torch(path) else []
        includes = [word for folder in paths for word in ("-isystem", folder)]
        command = [*COMPILER.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", *includes, alone]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compilers(request, tmp_path_factory):
    """All headers that are asked for, at once, on all cores."""
    asked = {item.callspec.params["path"] for item in request.session.items if "compilers" in item.fixturenames}
    folder = tmp_path_factory.mktemp("headers")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {path: pool.submit(compiled, path, folder) for path in sorted(asked) if reason_to_skip(path) is None}


def is_first_in_its_source(path):
    """Whether csrc/.../NAME.cpp begins with NAME.h. Building it then shows that the header compiles alone."""
    source = path.with_suffix(".cpp")
    return source.exists() and INCLUDE.search(source.read_text()).groups() == ('"', path.name)


def reason_to_skip(path):
    if part := PART.match(path.read_text()):
        return f"a part of {part[1]}, which includes it in its middle"
    if is_first_in_its_source(path):
        return f"{path.with_suffix('.cpp').name} begins with it, and has been built"
    if is_of_cuda(path):
        return None if NVCC else "there is no nvcc"
    return None if COMPILER else "there is no C++ compiler"


def named(path):
    """As a parameter; a header of torch or CUDA takes seconds."""
    marks = [pytest.mark.long] if is_of_torch(path) or is_of_cuda(path) else []
    return pytest.param(path, id=str(path.relative_to(CSRC)), marks=marks)


@pytest.mark.xdist_group("headers")  # which a process compiles at once
@pytest.mark.parametrize("path", [named(path) for path in HEADERS])
def test_a_header_compiles_alone(path, compilers):
    if reason := reason_to_skip(path):
        pytest.skip(reason)
    done = compilers[path].result()
    assert done.returncode == 0, done.stderr[-4000:]


def reached(path, seen):
    """The headers in <> that a file includes, itself or by way of others of csrc."""
    seen.add(path)
    included = INCLUDE.findall(path.read_text())
    others = {(path.parent / name).resolve() for quote, name in included if quote == '"'} - seen
    own = {name for quote, name in included if quote == "<"}
    return own.union(*(reached(other, seen) for other in others if other.exists()))


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(CSRC)) for path in SOURCES])
def test_standard_headers_are_included(path):
    code = re.sub(r"//.*", "", path.read_text())
    if part := PART.match(path.read_text()):
        path = path.parent / part[1]
    names, headers = set(re.findall(r"\bstd::(?:ranges::)?(\w+)", code)), reached(path, set())
    wanted = {header: sorted(n for n in names if re.fullmatch(pattern, n)) for header, pattern in STANDARD.items()}
    assert {header: used for header, used in wanted.items() if used and header not in headers} == {}
