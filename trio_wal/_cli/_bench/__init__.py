"""What `trio-wal bench` consists of.

`probe` measures a disk, `device` asks the system what it is, `advice` makes settings of both, and
`trial` tries them.
"""
