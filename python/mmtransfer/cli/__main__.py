from mmtransfer.cli import main

main()
