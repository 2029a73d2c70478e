"""The command line: parse, make the dataclasses of options, one call into the pipeline, print."""
