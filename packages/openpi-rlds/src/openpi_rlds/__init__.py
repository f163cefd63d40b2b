"""DROID, and datasets in its form, as TFDS writes them (RLDS): read without TensorFlow.

tfrecord    files of records            example   a record's features        folder   a dataset's files
episode     features -> columns, images           frame_ranges   which frames are kept
stream      records -> shuffled frames -> batches, resumable                 idle     writes frame ranges
"""
