"""How processes that work on large arrays one after the other get their memory, and keep it instead of handing it back for each.

glibc returns a freed array to the kernel, which zeroes its pages for the next one: a third of the time of counting pairs, before these.
The first touch of a page is not free either: where the kernel gives huge pages to those who ask (`madvise`), there are fewer of them.
"""

KEPT_MEMORY = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's own pool hands pages back, too
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the highest that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # ask for huge pages; older libraries and other systems pass over it
}
"""Environment of a process to be started."""
