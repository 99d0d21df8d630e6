from vmjob.cli.main import main

main()
