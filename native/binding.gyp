{
  "targets": [
    {
      "target_name": "node_nbd",
      "sources": [
        "src/assert.cc",
        "src/buffers.cc",
        "src/compose.cc",
        "src/connection.cc",
        "src/connection_read.cc",
        "src/connection_write.cc",
        "src/crc32c.cc",
        "src/datapath.cc",
        "src/glue.cc",
        "src/lane.cc",
        "src/layout.cc",
        "src/loop.cc",
        "src/parser.cc",
        "src/policy_io.cc",
        "src/shared.cc",
        "src/uring.cc",
        "src/work.cc"
      ],
      "include_dirs": ["<!@(node -p \"require('node-addon-api').include\")"],
      "defines": ["NAPI_VERSION=8", "NAPI_DISABLE_CPP_EXCEPTIONS", "NODE_ADDON_API_DISABLE_DEPRECATED"],
      "cflags": ["-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"],
      "cflags!": ["-O3"],
      "cflags_cc": ["-std=c++20", "-O2", "-fno-exceptions", "-fno-rtti"],
      "cflags_cc!": ["-std=gnu++17", "-std=gnu++20", "-O3"]
    },
    {
      "target_name": "nbd_keep",
      "type": "executable",
      "sources": ["keeper/main.cc", "keeper/netlink.cc", "keeper/handshake.cc"],
      "cflags": ["-Wall", "-Wextra", "-Wconversion"],
      "cflags!": ["-O3"],
      "cflags_cc": ["-std=c++20", "-O2", "-fno-exceptions", "-fno-rtti"],
      "cflags_cc!": ["-std=gnu++17", "-std=gnu++20", "-O3"]
    }
  ]
}
