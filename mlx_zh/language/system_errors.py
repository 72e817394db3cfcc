"""What the operating system says of an error, in Chinese. Messages quote it: `{path} cannot be written: {reason}.`"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

CHINESE = {
    errno.EPERM: "不允许这样操作",
    errno.ENOENT: "没有这个文件或文件夹",
    errno.EINTR: "操作被打断",
    errno.EIO: "读写出错",
    errno.ENXIO: "没有这个设备",
    errno.EAGAIN: "资源暂时不可用",
    errno.ENOMEM: "内存不足",
    errno.EACCES: "没有权限",
    errno.EBUSY: "设备或文件正在使用",
    errno.EEXIST: "文件已经存在",
    errno.EXDEV: "不能跨磁盘操作",
    errno.ENODEV: "没有这个设备",
    errno.ENOTDIR: "不是文件夹",
    errno.EISDIR: "是文件夹，不是文件",
    errno.EINVAL: "参数无效",
    errno.ENFILE: "系统打开的文件太多",
    errno.EMFILE: "打开的文件太多",
    errno.ETXTBSY: "文件正在使用",
    errno.EFBIG: "文件太大",
    errno.ENOSPC: "磁盘空间已满",
    errno.EROFS: "磁盘是只读的",
    errno.EMLINK: "链接太多",
    errno.EPIPE: "管道已断开",
    errno.ENAMETOOLONG: "文件名太长",
    errno.ENOLCK: "无法再加锁",
    errno.ENOTEMPTY: "文件夹不是空的",
    errno.ELOOP: "链接绕成了圈",
    errno.EADDRINUSE: "地址已被占用",
    errno.EADDRNOTAVAIL: "无法使用这个地址",
    errno.ENETDOWN: "网络已断开",
    errno.ENETUNREACH: "无法连到网络",
    errno.ECONNABORTED: "连接中断",
    errno.ECONNRESET: "连接被对方断开",
    errno.ETIMEDOUT: "连接超时",
    errno.ECONNREFUSED: "连接被拒绝",
    errno.EHOSTUNREACH: "无法连到对方的机器",
    errno.EDQUOT: "磁盘配额已用完",
    errno.ESTALE: "网络上的文件已失效",
    errno.EOPNOTSUPP: "不支持这样操作",
}


def in_both_languages() -> Iterator[tuple[str, str]]:
    """Every text, in English as this system words it, and in Chinese."""
    for number, chinese in CHINESE.items():
        yield os.strerror(number), chinese
