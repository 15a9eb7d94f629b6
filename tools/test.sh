# C++ tests, then Python tests, on as many processes as there are cores; neither keeps the other from running. The
# arguments are pytest's.
if [ "$(command -v cmake)" ]; then
  cmake -G Ninja -S . -B build/cmake && cmake --build build/cmake && ctest --test-dir build/cmake --output-on-failure
  cpp=$?
else
  echo "Skipped the C++ tests: there is no cmake."
  cpp=0
fi

python -m pytest -rs -n auto --maxprocesses 8 --dist loadgroup "$@"
python=$?

[ $cpp -eq 0 ] || echo "C++ tests failed: see above."
[ $cpp -eq 0 ] && [ $python -eq 0 ]
