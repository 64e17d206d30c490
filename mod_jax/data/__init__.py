"""From records to batches, in rooms that build on each other.

- `sources`: where records come from.
- `samples`: a record becomes tokens and pixels.
- `batches`: which samples when, and in which row.
- `prepare`: a source becomes shards, once.
- `scenes`: the built-in data set.
"""

MARKER = "<image>"  # marks the place of a picture in a text; each tokenizer has it as one token
