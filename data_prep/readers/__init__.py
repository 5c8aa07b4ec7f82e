"""From a slice of a file to records, in constant memory whatever the file holds.

A reader yields `Record`s in file order: a document (UTF-8 bytes, an id, its location) or, where the record cannot be used,
the reason. Locations are `path@offset` (byte offset in the decompressed stream) for JSON and CSV, `path#row` for Parquet
and Arrow, `path#record` for WARC, `path` for a text file. Reasons:

invalid_json, invalid_csv     the line, element or row cannot be parsed
invalid_utf8, lone_surrogates the text is no text
missing_field                 there is no such field or column
null_field                    the field is null
non_string_field              the field holds something else
empty_document
too_large                     a record or document over `corpus.max_document_bytes`; its bytes are skipped, never held
corrupt_file                  the rest of a damaged stream, or of a damaged Parquet row group, is one record
page_too_large                a Parquet row group that cannot be read in bounded memory, as one record
not_messages                  a conversation is no list of {role, content}, or its file is no JSON
template_refuses              the tokenizer's chat template does not lay out messages of these roles
missing_filter_field          a condition's field is not there, or
filter_type_mismatch          holds something that does not compare with the condition's value
batch_too_large               an Arrow record batch that cannot be read in bounded memory, as one record
"""

from data_prep.readers.json_documents import is_json_lines
from data_prep.readers.parquet import row_group_bytes
from data_prep.readers.read import read_slice
from data_prep.readers.record import ReaderSettings, Record

__all__ = ["ReaderSettings", "Record", "is_json_lines", "read_slice", "row_group_bytes"]
