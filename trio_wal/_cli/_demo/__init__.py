"""What `trio-wal demo` is made of: the workload, the process that writes and is killed,
the ledger of what was acknowledged and what was found, and the run that joins them.

Law: nothing here prints.  The ledger trusts nothing that the log says about itself: it
compares with the source, byte by byte.
"""
