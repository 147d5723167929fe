"""A log's files: their bytes, what a crash leaves of them, and who judges that.

Law: everything here blocks and is called from a worker thread, or from no loop at all; no
trio, no promises to users.  From bytes to judges: ``frame`` ``scan`` (pure), ``segment``
``chain`` ``recovery`` ``repair`` ``directory`` ``cursor`` ``verify``.
"""
