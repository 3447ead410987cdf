"""What runs in a child process: take a datagram, vet its fds, bind, make nodes, release; and the other roles' work.

Only this side touches a client's fds and opens devices. A file that never answers hangs one child and nothing else.

Imports: children, kernel, protocol.
Never: decides what a client may do, or changes the books.
"""
