#!/usr/bin/env bash
# Version: pyarrow==26.0.1
# Behaviour: string_view and binary_view travel anywhere in Arrow (IPC files hold dictionaries and runs of them), but cannot be taken
#   out again: dictionary_decode, take and run_end_decode have no kernel for views and raise ArrowNotImplementedError, and casting the
#   dictionary column does, too. A view column alone casts to large_binary, so the values have to be cast first and the dictionary or
#   the runs rebuilt around them. `to_pylist` works on all.
# Seen: pyarrow 26.0.1: three times ArrowNotImplementedError, then ['a', 'b', 'a'] by casting the values first
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"; "$folder/venv/bin/pip" -q install pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
import io
import pyarrow as pa
import pyarrow.compute as pc

views = pa.array(["a", "b"], pa.string_view())
table = pa.table(
    {
        "dictionary": pa.DictionaryArray.from_arrays([0, 1, 0], views),
        "runs": pa.RunEndEncodedArray.from_arrays([2, 3], views),
    }
)
sink = io.BytesIO()
with pa.ipc.new_file(sink, table.schema) as writer:
    writer.write_table(table)
read = pa.ipc.open_file(sink.getvalue()).read_all()
assert read["dictionary"].to_pylist() == ["a", "b", "a"] and read["runs"].to_pylist() == ["a", "a", "b"]
dictionary, runs = read["dictionary"].chunk(0), read["runs"].chunk(0)
raised = []
for name, decode in {
    "dictionary_decode": dictionary.dictionary_decode,
    "cast": lambda: dictionary.cast(pa.string()),
    "run_end_decode": lambda: pc.run_end_decode(runs),
}.items():
    try:
        decode()
        raised.append("nothing")
    except pa.ArrowNotImplementedError as error:
        raised.append("ArrowNotImplementedError")
    print(f"{name}: {raised[-1]}")
rebuilt = pa.DictionaryArray.from_arrays(dictionary.indices, dictionary.dictionary.cast(pa.large_string()))
print("values cast first:", rebuilt.dictionary_decode().to_pylist())
assert raised == ["ArrowNotImplementedError"] * 3
assert rebuilt.dictionary_decode().to_pylist() == ["a", "b", "a"]
PYTHON
