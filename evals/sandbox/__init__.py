"""One untrusted Python program at a time, in a process that can reach nothing but its own memory and folder.

run.py       what the rest calls: limits in, an outcome out
jail.py      the process that builds the sandbox around the program, watches it and ends it
setup.py     the steps that build it, in order
kernel.py    Linux's calls for them: namespaces, mounts, Landlock, capabilities
seccomp.py   the calls that the program may not make
tester.py    runs a problem's tests in a process that the program cannot touch
driver.py    what the program's own process runs first
"""
