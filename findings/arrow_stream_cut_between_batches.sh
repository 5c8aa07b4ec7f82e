#!/usr/bin/env bash
# Version: pyarrow==26.0.1
# Behaviour: an Arrow IPC stream (what Hugging Face datasets save) that was cut off exactly between two record batches reads without
#   any error, with fewer rows: pyarrow takes the end of the file for the end of the stream, although its own writer always ends a
#   stream with an end-of-stream mark (FF FF FF FF 00 00 00 00). Cut anywhere else it raises OSError. To tell a whole stream from
#   a cut one, a reader must look for the mark itself.
# Seen: pyarrow 26.0.1: "whole: 30 rows", "cut between batches: 20 rows, no error", "cut within a batch: OSError", "mark at the end: True, False"
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"; "$folder/venv/bin/pip" -q install pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON' || { echo "not as it was seen: the behaviour has changed" >&2; exit 1; }
import io
import pyarrow as pa

sink, ends = io.BytesIO(), []
table = pa.table({"text": [f"document {row}" for row in range(30)]})
with pa.ipc.new_stream(sink, table.schema) as writer:
    for batch in table.to_batches(max_chunksize=10):
        writer.write_batch(batch)
        ends.append(sink.tell())
whole = sink.getvalue()
cut = whole[: ends[1]]
rows = [pa.ipc.open_stream(data).read_all().num_rows for data in (whole, cut)]
print(f"whole: {rows[0]} rows")
print(f"cut between batches: {rows[1]} rows, no error")
try:
    pa.ipc.open_stream(whole[: ends[1] - 5]).read_all()
    within = "no error"
except OSError:
    within = "OSError"
print(f"cut within a batch: {within}")
mark = b"\xff\xff\xff\xff\x00\x00\x00\x00"
print(f"mark at the end: {whole.endswith(mark)}, {cut.endswith(mark)}")
assert (rows, within, whole.endswith(mark), cut.endswith(mark)) == ([30, 20], "OSError", True, False)
PYTHON
