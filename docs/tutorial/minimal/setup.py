from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

extension = CppExtension("_tinyloss", ["tinyloss.cpp"], extra_compile_args=["-O3", "-g0"])
setup(name="tinyloss", py_modules=["tinyloss"], ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
